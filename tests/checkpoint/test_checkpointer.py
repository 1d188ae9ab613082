from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from training.checkpoint import checkpointer as module
from training.checkpoint import exchange
from training.checkpoint.checkpointer import (
    Checkpointer,
    NotFinite,
    Share,
    StepCheckpoint,
    check_usable,
    new_token,
    read_step_checkpoint,
)
from training.checkpoint.exchange import put_in_place
from training.checkpoint.manifest import (
    MANIFEST_NAME,
    DamagedCheckpoint,
    describe,
    read_manifest,
    read_train,
    verify,
    write_manifest,
)
from training.checkpoint.tags import Tags


def _content(value: float) -> StepCheckpoint:
    tensor = torch.full((40, 3), value)
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
    assert torch.equal(read.model["w"], torch.full((40, 3), 0.5))
    assert torch.equal(read.rng["0//cpu"], torch.get_rng_state())
    assert read.data["lanes"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read.data["pieces"].shape == (0, 5)
    assert read.train == {"v": 0.5}


def test_only_the_newest_are_kept_and_nothing_temporary_stays(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, _content(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000002", "step_00000003"]


DAMAGES = ["flip", "hole", "truncate", "empty", "delete", "no manifest", "bad manifest", "other format", "way out"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save(1, _content(1))
    _damage(checkpointer.save(2, _content(2)), damage)
    assert checkpointer.newest() == tmp_path / "step_00000001"


def _damage(path: Path, damage: str) -> None:
    weights, manifest = path / "model.safetensors", path / MANIFEST_NAME
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "hole":
        content[-16:] = bytes(16)
    elif damage == "truncate":
        del content[-8:]
    elif damage == "empty":
        content.clear()
    if damage == "delete":
        weights.unlink()
    else:
        weights.write_bytes(content)
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{")
    elif damage == "other format":
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    elif damage == "way out":
        manifest.write_text(manifest.read_text().replace("model.safetensors", "../../model.safetensors"))


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


def test_the_manifest_says_which_start_of_which_size_wrote_it(tmp_path: Path) -> None:
    manifest = read_manifest(Checkpointer(tmp_path, generation=7).save(3, _content(1)))
    assert (manifest.step, manifest.generation, manifest.world_size) == (3, 7, 1)
    assert len(manifest.sha256) == 64


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path).save(3, _content(0.5))
    content = json.loads((path / MANIFEST_NAME).read_text())
    (path / MANIFEST_NAME).write_text(json.dumps({"format": 1, "step": 3, "files": content["files"]}))
    assert torch.equal(read_step_checkpoint(path).model["w"], torch.full((40, 3), 0.5))
    assert verify(path).world_size == 0


def _save_in_parts(checkpointer: Checkpointer, *, writers: list[int]) -> Path:
    """Rank 0 commits while the other parts are still being written."""
    staging = checkpointer.new_staging(5, token=new_token())
    checkpointer.open_staging(staging)
    shares = {
        place: Share({f"model-{place:05d}-of-00002.safetensors": {f"w{place}": torch.ones(4)}}, {}) for place in writers
    }
    threads = [
        threading.Timer(0.1 * place, checkpointer.write_share, (staging, share), {"writer": place})
        for place, share in shares.items()
    ]
    for thread in threads:
        thread.start()
    try:
        return checkpointer.commit(5, staging, writers=[0, 1], world_size=2)
    finally:
        for thread in threads:
            thread.join()


def test_parts_of_several_writers_become_one_checkpoint_when_the_last_has_finished(tmp_path: Path) -> None:
    path = _save_in_parts(Checkpointer(tmp_path), writers=[0, 1])
    assert sorted(item.name for item in path.iterdir()) == [
        MANIFEST_NAME,
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    assert read_manifest(path).world_size == 2
    verify(path)


def test_a_writer_that_never_finishes_ends_the_attempt(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, receipt_timeout_s=0.1)
    with pytest.raises(RuntimeError, match=r"rank 1 has not written its part of .tmp-.* after 0 s.*--logs"):
        _save_in_parts(checkpointer, writers=[0])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_says_so_in_its_receipt(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    staging = checkpointer.new_staging(5, token=new_token())
    checkpointer.open_staging(staging)
    checkpointer.write_share(staging, Share({}, {"train.json": "{}"}), writer=0)
    ruined = Share({"model.safetensors": {"w": torch.tensor([float("inf")])}}, {})
    with pytest.raises(NotFinite, match="'w'"):
        checkpointer.write_share(staging, ruined, writer=1)
    with pytest.raises(RuntimeError, match=r"rank 1 could not write its part: NotFinite"):
        checkpointer.commit(5, staging, writers=[0, 1])
    assert list(tmp_path.iterdir()) == []


def test_what_reads_back_otherwise_does_not_become_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.write_manifest

    def write_and_flip(directory: Path, *arguments: object, **keywords: object) -> None:
        real(directory, *arguments, **keywords)  # type: ignore[arg-type]
        _damage(directory, "flip")

    Checkpointer(tmp_path).save(1, _content(1))
    monkeypatch.setattr(module, "write_manifest", write_and_flip)
    with pytest.raises(DamagedCheckpoint, match="what was just written reads back otherwise"):
        Checkpointer(tmp_path).save(2, _content(2))
    assert Checkpointer(tmp_path).steps() == [1]


class _Lost(RuntimeError):
    pass


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_start_that_lost_the_run_commits_nothing_and_deletes_nothing(tmp_path: Path, allowed: int) -> None:
    answers = [None] * allowed

    def fence() -> None:
        if not answers:
            raise _Lost("generation 8 owns the run")
        answers.pop()

    for step in (1, 2):
        Checkpointer(tmp_path).save(step, _content(step))
    zombie = Checkpointer(tmp_path, fence=fence)
    with pytest.raises(_Lost, match="generation 8"):
        zombie.save(3, _content(3))
    assert isinstance(zombie.fenced_by, _Lost)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001", "step_00000002"]
    with pytest.raises(_Lost):
        zombie.tag_suspect(1)


def test_a_disk_of_leases_that_fails_is_a_failed_save_and_no_lost_run(tmp_path: Path) -> None:
    def fence() -> None:
        raise OSError(5, "Input/output error")

    checkpointer = Checkpointer(tmp_path, fence=fence)
    with pytest.raises(OSError, match="Input/output error"):
        checkpointer.save(1, _content(1))
    assert checkpointer.fenced_by is None


def test_a_suspect_checkpoint_is_taken_only_if_nothing_else_is_whole(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpointer.save(step, _content(step))
    assert checkpointer.tag_suspect(2) == [2, 3]
    assert checkpointer.newest() == checkpointer.path(1)
    _damage(checkpointer.path(1), "flip")
    assert checkpointer.newest() == checkpointer.path(3)


def test_a_step_that_is_reached_again_replaces_what_was_there_and_its_tags(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))
    checkpointer.tag_suspect(1)
    checkpointer.save(1, _content(2))
    assert read_step_checkpoint(checkpointer.path(1)).train == {"v": 2}
    assert checkpointer.tags() == Tags()
    checkpointer.tag_suspect(1, coming=[1])
    checkpointer.save(1, _content(3))
    assert checkpointer.tags().suspect == {1}
    assert not list(tmp_path.glob(".tmp-*"))


def test_tags_that_cannot_be_written_are_known_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", full)
        checkpointer.tag_suspect(1)
    assert checkpointer.tags().suspect == {1}
    assert not (tmp_path / "TAGS.json").exists()
    checkpointer.tag_suspect(1)
    assert Checkpointer(tmp_path).tags().suspect == {1}


def test_tags_that_cannot_be_read_count_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "TAGS.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert Checkpointer(tmp_path).tags() == Tags()
    assert "no checkpoint counts as tagged" in caplog.text


def test_what_earlier_starts_left_is_removed_and_what_a_later_one_writes_is_not(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, generation=5)
    checkpointer.save(1, _content(1))
    stays = Checkpointer(tmp_path, generation=6).new_staging(9, token=new_token())
    own = checkpointer.new_staging(2, token=new_token())
    checkpointer.open_staging(own)
    checkpointer.write_share(own, Share({}, {"train.json": "{}"}), writer=0)
    leftovers = [
        tmp_path / ".tmp-00000001-dead",
        tmp_path / ".tmp-trash-00000001-12345678",
        Checkpointer(tmp_path, generation=4).new_staging(3, token=new_token()),
    ]
    for directory in (*leftovers, stays):
        directory.mkdir()
    (tmp_path / ".tmp-epoch_1-g00000000-12345678.pt").touch()
    assert len(checkpointer.clean_up()) == 4
    assert sorted(tmp_path.glob(".tmp-*")) == sorted([stays, own])


def test_retention_outlives_a_directory_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "step_00000001":
            raise PermissionError(13, "Permission denied")
        return real(path, target)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "rename", rename)
        for step in (2, 3):
            checkpointer.save(step, _content(step))
    assert "step_00000001 cannot be deleted" in caplog.text
    assert checkpointer.steps() == [1, 2, 3]
    checkpointer.save(4, _content(4))
    assert checkpointer.steps() == [3, 4]


def test_checkpoints_that_are_put_aside_are_kept_and_no_longer_found(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))
    checkpointer.set_aside()
    checkpointer.save(1, _content(2))
    checkpointer.set_aside()
    assert checkpointer.steps() == []
    aside = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert aside[0] == "damaged-step_00000001"
    assert len(aside) == 2


def test_the_hint_names_the_newest_and_decides_nothing(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))
    checkpointer.save(2, _content(2))
    assert (tmp_path / "LATEST").read_text() == "step_00000002\n"
    (tmp_path / "LATEST").write_text("step_00000001\n")
    os.utime(checkpointer.path(1), (2e9, 2e9))
    assert checkpointer.newest() == checkpointer.path(2)


def test_ruined_weights_are_not_usable_whatever_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_check_finite", lambda share: None)
    path = Checkpointer(tmp_path).save(1, _content(float("nan")))
    verify(path)
    with pytest.raises(DamagedCheckpoint, match=r"holds weights that are not finite \('w'\)"):
        check_usable(path)


def test_two_directories_change_names_also_where_the_system_has_no_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name / name).mkdir(parents=True)
    new, old, aside = (tmp_path / name for name in ("a", "b", "aside"))
    assert put_in_place(new, old, aside=aside) == new
    assert (old / "a").is_dir()
    monkeypatch.setattr(exchange, "_exchange_at_once", lambda first, second: False)
    assert put_in_place(new, old, aside=aside) == aside
    assert (old / "b").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "b"]


def test_a_checkpoint_that_cannot_be_replaced_is_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, _content(1))
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-00000001") and target.name == "step_00000001":
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(exchange, "_exchange_at_once", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        checkpointer.save(1, _content(2))
    assert read_step_checkpoint(checkpointer.path(1)).train == {"v": 1}
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("in_its_place", ["nothing", "whole", "damaged"])
def test_a_checkpoint_that_was_being_replaced_comes_back_unless_the_new_one_is_whole(
    tmp_path: Path, in_its_place: str
) -> None:
    final = Checkpointer(tmp_path, generation=4).save(1, _content(1))
    final.rename(tmp_path / f".tmp-aside-{final.name}-g00000004-12345678")
    if in_its_place != "nothing":
        Checkpointer(tmp_path, generation=4).save(1, _content(2))
    if in_its_place == "damaged":
        _damage(final, "flip")
    assert Checkpointer(tmp_path, generation=3).clean_up() == [], "a later start is replacing it"
    Checkpointer(tmp_path, generation=5).clean_up()
    assert read_step_checkpoint(final).train == {"v": 2 if in_its_place == "whole" else 1}
    assert not list(tmp_path.glob(".tmp-*"))
    assert len(list(tmp_path.glob("damaged-*"))) == (in_its_place == "damaged")


def test_a_janitor_has_nothing_to_do_where_there_is_no_directory_yet(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none", generation=1).clean_up() == []


@pytest.mark.parametrize("first", [15, 25])
def test_a_damaged_checkpoint_does_not_push_out_the_only_whole_one(
    tmp_path: Path, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        Checkpointer(tmp_path, keep=2).save(step, _content(step))
    _damage(tmp_path / "step_00000020", "flip")
    checkpointer = Checkpointer(tmp_path, keep=2)
    with caplog.at_level(logging.WARNING):
        checkpointer.save(first, _content(first))
    assert "A damaged checkpoint does not count among those that are kept" in caplog.text
    assert checkpointer.steps() == [10, first]
    _damage(checkpointer.path(first), "flip")
    assert checkpointer.newest() == checkpointer.path(10)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path).save(1, _content(1)).rename(tmp_path / "step_00000002")
    with pytest.raises(DamagedCheckpoint, match=r"step_00000002 holds the checkpoint of step 1, by its MANIFEST.json"):
        verify(path)
    verify(path.rename(tmp_path / "my best one"))


@pytest.mark.parametrize("version", [1, 2])
def test_counters_of_another_step_are_damage(tmp_path: Path, version: int) -> None:
    path = Checkpointer(tmp_path).save(1, _content(1))
    (path / "train.json").write_text(json.dumps({"step": 2}))
    files = {name: describe(path / name) for name in read_manifest(path).files}
    write_manifest(path, files, step=1)
    if version == 1:
        content = {"format": 1, "step": 1, "files": {name: facts._asdict() for name, facts in files.items()}}
        (path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(DamagedCheckpoint, match=r"train.json is of step 2, the MANIFEST.json beside it of 1"):
        verify(path)


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_counters_that_are_no_object_are_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"train.json cannot be read"):
        read_train(tmp_path)


def test_a_manifest_that_was_changed_is_damage_and_one_of_an_earlier_version_is_not(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path).save(1, _content(1))
    manifest = path / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"generation": 9}))
    with pytest.raises(DamagedCheckpoint, match=r"MANIFEST.json .*its content is not what was written"):
        read_manifest(path)
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    verify(path)


def test_a_writer_that_is_late_does_not_bring_back_what_was_abandoned(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    staging = checkpointer.new_staging(5, token=new_token())
    checkpointer.open_staging(staging)
    checkpointer.abandon(staging)
    with pytest.raises(FileNotFoundError):
        checkpointer.write_share(staging, Share({}, {"train.json": "{}"}), writer=1)
    assert list(tmp_path.iterdir()) == []


def test_retention_leaves_what_is_being_read_until_it_is_not(tmp_path: Path) -> None:
    writer, reader = Checkpointer(tmp_path), Checkpointer(tmp_path)  # of one process, as the mirror has its own
    for step in (1, 2):
        writer.save(step, _content(float(step)))
    with reader.hold(1), reader.hold(2):
        for step in (3, 4):
            writer.save(step, _content(float(step)))
        assert writer.steps() == [1, 2, 3, 4]
    writer.remove_old()
    assert writer.steps() == [3, 4]


def test_a_scratch_directory_is_gone_afterwards_and_none_of_the_janitors_business(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with checkpointer.scratch() as scratch:
        (scratch / "file").write_text("x")
        assert checkpointer.clean_up() == []
        assert scratch.exists()
    assert list(tmp_path.iterdir()) == []
    with checkpointer.scratch() as scratch:
        assert Checkpointer(tmp_path).clean_up() == [scratch]  # by a later start: this process was killed
