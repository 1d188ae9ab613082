from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.checkpoint.checkpointer import Checkpointer, NotFinite, StepCheckpoint, read_step_checkpoint
from training.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, verify
from training.checkpoint.retention import steps_to_delete


def _content(value: float) -> StepCheckpoint:
    tensor = torch.full((4, 3), value)
    return StepCheckpoint(
        model={"w": tensor},
        optimizer={"w//exp_avg": tensor},
        rng={"0//cpu": torch.get_rng_state()},
        data={"lanes": torch.arange(6, dtype=torch.int32).view(2, 3), "pieces": torch.zeros(0, 5, dtype=torch.int64)},
        train={"v": value},
    )


def test_what_was_saved_is_what_is_read(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, keep=2).save(7, _content(0.5))
    read = read_step_checkpoint(path)
    assert path.name == "step_00000007"
    assert torch.equal(read.model["w"], torch.full((4, 3), 0.5))
    assert torch.equal(read.rng["0//cpu"], torch.get_rng_state())
    assert read.data["lanes"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read.data["pieces"].shape == (0, 5)
    assert read.train == {"v": 0.5}


def test_only_the_newest_are_kept_and_nothing_temporary_stays(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, _content(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, _content(1))
    _damage(checkpointer.save(2, _content(2)), damage)
    assert checkpointer.newest() == tmp_path / "step_00000001"


def _damage(path: Path, damage: str) -> None:
    weights, manifest = path / "model.safetensors", path / MANIFEST_NAME
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "delete":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2):
        _damage(checkpointer.save(step, _content(step)), "flip")
    with pytest.raises(DamagedCheckpoint, match=r"None of the 2 step checkpoints .* is whole .*--resume PATH"):
        checkpointer.newest()


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none", keep=2).newest() is None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    path = checkpointer.save(1, _content(1))
    _damage(path, "flip")
    checkpointer.save(1, _content(1))
    verify(path)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_trace(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, _content(1))
    with pytest.raises(NotFinite, match=r"the weights are not finite \('w'\)"):
        checkpointer.save(2, _content(float("nan")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001"]


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, keep=2).save(1, _content(1))
    files = json.loads((path / MANIFEST_NAME).read_text())["files"]
    assert set(files) == {item.name for item in path.iterdir()} - {MANIFEST_NAME}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())


def test_retention_keeps_the_newest_and_never_only_one() -> None:
    assert steps_to_delete([30, 10, 20], keep=2, verified=[30]) == [10]
    assert steps_to_delete([10], keep=2, verified=[10]) == []
    with pytest.raises(ValueError, match=r"keep=1 .*--keep-checkpoints 2"):
        steps_to_delete([1], keep=1, verified=[])
