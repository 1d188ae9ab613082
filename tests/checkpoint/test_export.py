from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny_run import build_saver, tiny_parts, train_steps
from training.checkpoint.export import (
    delete_epoch_file,
    export_epoch_file,
    newest_epoch_file,
    read_epoch_file,
    write_epoch_file,
)
from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver

CONTENT = {
    "epoch": 3,
    "name": "run",
    "state_dict": {"w": torch.ones(2)},
    "optimizer": {"state": {}, "param_groups": []},
}


def test_numbered_and_latest_are_written_once_and_read_back(tmp_path: Path) -> None:
    paths = write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=True, latest=True)
    assert [path.name for path in paths] == ["epoch_3.pt", "epoch_latest.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_3.pt", "epoch_latest.pt"]
    for path in paths:
        read = read_epoch_file(str(path))
        assert (read.epoch, read.scaler) == (3, None)
        assert torch.equal(read.state_dict["w"], torch.ones(2))


def test_latest_is_written_where_hard_links_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=True, latest=True)
    assert read_epoch_file(str(tmp_path / "epoch_latest.pt")).epoch == 3


def test_nothing_due_writes_nothing(tmp_path: Path) -> None:
    assert write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=False, latest=False) == []
    assert list(tmp_path.iterdir()) == []


def test_the_newest_epoch_is_chosen_by_number_and_nothing_else_by_name(tmp_path: Path) -> None:
    assert newest_epoch_file(tmp_path) is None
    for name in ("epoch_9.pt", "epoch_10.pt", "tmp.pt", "results.jsonl", "epoch_x.pt"):
        (tmp_path / name).touch()
    assert newest_epoch_file(tmp_path) == tmp_path / "epoch_10.pt"
    (tmp_path / "epoch_latest.pt").touch()
    assert newest_epoch_file(tmp_path) == tmp_path / "epoch_latest.pt"


def test_files_of_distributed_open_clip_runs_lose_their_prefix(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {"module.visual.proj": torch.zeros(1)}}, tmp_path / "epoch_1.pt")
    assert list(read_epoch_file(str(tmp_path / "epoch_1.pt")).state_dict) == ["visual.proj"]


def test_bare_weights_start_at_epoch_zero(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    read = read_epoch_file(str(tmp_path / "w.pt"))
    assert (read.epoch, read.optimizer, list(read.state_dict)) == (0, None, ["w"])


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("kind", ["malicious", "truncated", "text", "missing"])
def test_unreadable_files_are_an_error_and_run_no_code(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "epoch_1.pt"
    if kind == "malicious":
        torch.save({"state_dict": _Malice()}, path)
    elif kind == "truncated":
        torch.save(CONTENT, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "text":
        path.write_text("<html>")
    with pytest.raises(ValueError, match=r"epoch_1\.pt.*cannot be read as a checkpoint.*--resume"):
        read_epoch_file(str(path))
    assert not (tmp_path / "canary").exists()


def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path) -> None:
    torch.save(torch.zeros(1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a Tensor and no checkpoint"):
        read_epoch_file(str(tmp_path / "x.pt"))


def test_previous_epoch_files_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pt").touch()
    delete_epoch_file(tmp_path, epoch=1)
    delete_epoch_file(tmp_path, epoch=1)
    assert list(tmp_path.iterdir()) == []


def _saved(root: Path, **settings: object) -> tuple[RunParts, Path]:
    parts = tiny_parts()
    train_steps(parts, 2)
    saver = build_saver(root, parts, **settings)
    saver.save_epoch(1)
    saver.finish()
    return parts, root / "step_00000002"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return list(left) == list(right) and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and all(_equal(*pair) for pair in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def test_the_epoch_file_made_from_a_checkpoint_is_what_the_live_state_would_give(tmp_path: Path) -> None:
    parts, _ = _saved(tmp_path, save_most_recent=True)
    for name in ("epoch_1.pt", "epoch_latest.pt"):
        content = torch.load(tmp_path / name, weights_only=True)
        assert list(content) == ["epoch", "name", "state_dict", "optimizer", "global_step", "samples_seen"]
        assert (content["epoch"], content["name"], content["global_step"], content["samples_seen"]) == (1, "run", 2, 8)
        assert _equal(dict(parts.model.state_dict()), content["state_dict"])
        assert content["optimizer"]["state"].keys() == parts.optimizer.state_dict()["state"].keys()
        for index, state in parts.optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, content["optimizer"]["state"][index][key]) for key, value in state.items())
        for ours, live in zip(
            content["optimizer"]["param_groups"], parts.optimizer.state_dict()["param_groups"], strict=True
        ):
            assert ours == live
            assert all(type(ours[key]) is type(live[key]) for key in live)


def test_one_tensor_of_an_exported_file_does_not_drag_the_others_along(tmp_path: Path) -> None:
    _saved(tmp_path)
    content = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert content["state_dict"]["logit_scale"].untyped_storage().nbytes() == 4


def test_an_epoch_file_without_the_optimizer_holds_the_weights(tmp_path: Path) -> None:
    _, step = _saved(tmp_path)
    export_epoch_file(step, tmp_path / "w.pt", name="other", with_optimizer=False)
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert (content["name"], "optimizer" in content) == ("other", False)


def test_a_directory_of_the_first_format_has_no_optimizer_settings_to_export(tmp_path: Path) -> None:
    _, step = _saved(tmp_path)
    train = json.loads((step / "train.json").read_text())
    del train["param_groups"]
    (step / "train.json").write_text(json.dumps(train))
    with pytest.raises(ValueError, match="an earlier version.*only its weights can be exported"):
        export_epoch_file(step, tmp_path / "x.pt", name="run")


def test_only_the_file_of_the_epoch_before_is_deleted_on_request(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, delete_previous_checkpoint=True)
    for epoch in (1, 2, 3):
        train_steps(parts)
        saver.save_epoch(epoch)
    saver.finish()
    assert [path.name for path in tmp_path.glob("*.pt")] == ["epoch_3.pt"]


def _at_epoch(root: Path, epoch: int, **settings: object) -> Saver:
    """A start that stands at the end of an epoch, which has its step checkpoint and no epoch files yet."""
    parts = tiny_parts()
    train_steps(parts, epoch)
    saver = build_saver(root, parts, **settings)
    saver.save_now_and_wait(epoch, "signal")
    return saver


def _names_after_owed(saver: Saver, root: Path, epoch: int) -> list[str]:
    saver.export_owed(epoch)
    saver.finish()
    return sorted(path.name for path in root.glob("*.pt"))


@pytest.mark.parametrize(
    ("settings", "there", "expected"),
    [
        ({}, [], ["epoch_2.pt"]),
        ({"save_frequency": 2}, [], ["epoch_2.pt"]),
        ({"save_frequency": 4}, [], []),
        ({"save_frequency": 0, "save_most_recent": True}, [], ["epoch_latest.pt"]),
        ({"delete_previous_checkpoint": True}, ["epoch_1.pt"], ["epoch_2.pt"]),
        ({"delete_previous_checkpoint": True}, ["epoch_3.pt"], ["epoch_3.pt"]),
    ],
)
def test_only_the_epoch_files_that_are_due_are_owed(
    tmp_path: Path, settings: dict[str, object], there: list[str], expected: list[str]
) -> None:
    saver = _at_epoch(tmp_path, 2, **settings)
    for name in there:
        (tmp_path / name).touch()
    assert _names_after_owed(saver, tmp_path, 2) == expected


def test_epoch_files_that_are_there_are_not_made_again_but_an_older_latest_is(tmp_path: Path) -> None:
    saver = _at_epoch(tmp_path, 2, save_most_recent=True)
    for name, epoch in (("epoch_2.pt", 2), ("epoch_latest.pt", 1)):
        torch.save({"epoch": epoch, "state_dict": {}}, tmp_path / name)
    assert _names_after_owed(saver, tmp_path, 2) == ["epoch_2.pt", "epoch_latest.pt"]
    assert read_epoch_file(str(tmp_path / "epoch_2.pt")).state_dict == {}
    assert read_epoch_file(str(tmp_path / "epoch_latest.pt")).epoch == 2
    torch.save({"epoch": 5, "state_dict": {}}, tmp_path / "epoch_latest.pt")
    _names_after_owed(saver, tmp_path, 2)
    assert read_epoch_file(str(tmp_path / "epoch_latest.pt")).epoch == 5


def test_nothing_is_owed_at_the_beginning_or_without_the_checkpoint_of_this_epoch(tmp_path: Path) -> None:
    assert _names_after_owed(_at_epoch(tmp_path, 0), tmp_path, 0) == []
    assert _names_after_owed(build_saver(tmp_path / "none", tiny_parts()), tmp_path, 1) == []
    assert _names_after_owed(_at_epoch(tmp_path, 2), tmp_path, 1) == [], "of another number of steps in an epoch"


def test_what_is_owed_is_not_made_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    saver = _at_epoch(tmp_path, 1)
    weights = tmp_path / "step_00000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"ruin")
    with pytest.raises(RuntimeError, match=r"The last save of the run failed \(DamagedCheckpoint: .*was written as"):
        _names_after_owed(saver, tmp_path, 1)
    assert not list(tmp_path.glob("*.pt"))


def test_a_step_that_is_saved_already_only_gets_its_epoch_file(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    saver.save_step(epoch=0)
    saver.save_epoch(1)
    saver.finish()
    assert [saved.step for saved in saver.poll()] == [0]
    assert torch.load(tmp_path / "epoch_1.pt", weights_only=True)["epoch"] == 1


def test_an_epoch_file_that_cannot_be_written_is_a_failed_save_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")  # what torch makes of a full disk

    saver = build_saver(tmp_path, tiny_parts())
    monkeypatch.setattr(torch, "save", full)
    saver.save_epoch(3)
    with pytest.raises(RuntimeError, match=r"The last save of the run failed \(epoch_3.pt: RuntimeError.*enforce fail"):
        saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000000"]


def test_a_flipped_bit_in_an_epoch_file_is_not_read_as_a_weight(tmp_path: Path) -> None:
    """torch.load compares no check sums, whichever way it reads."""
    path, weights = tmp_path / "epoch_1.pt", torch.arange(5000.0)
    torch.save({"epoch": 1, "state_dict": {"w": weights}}, path)
    data = bytearray(path.read_bytes())
    data[data.find(weights.numpy().tobytes()) + 4001] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].shape == (5000,)
    with pytest.raises(ValueError, match=r"epoch_1.pt' cannot be read as a checkpoint \(it is damaged"):
        read_epoch_file(str(path))


def test_a_file_of_the_old_format_is_read_as_well(tmp_path: Path) -> None:
    torch.save(
        {"epoch": 2, "state_dict": {"w": torch.ones(3)}}, tmp_path / "x.pt", _use_new_zipfile_serialization=False
    )
    assert read_epoch_file(str(tmp_path / "x.pt")).epoch == 2
