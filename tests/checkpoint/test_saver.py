"""A saver over a real run in miniature: what is due, what is dropped, what fails, and what is on the disk then."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny_run import ALONE, build_saver, same, state_of, tiny_parts, train_steps
from training.checkpoint import checkpointer as checkpointer_module
from training.checkpoint import saver as saver_module
from training.checkpoint.checkpointer import Checkpointer, read_step_checkpoint
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.run_state import find_resume_path, restore
from training.checkpoint.tags import Best

PLAN = {"runtime": ALONE, "steps_per_epoch": 16, "samples_per_step": 4}


@contextmanager
def _slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing stops until the event is set."""
    go_on = threading.Event()
    real = checkpointer_module.write_tensors

    def write(*arguments: object) -> object:
        assert go_on.wait(timeout=20)
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "write_tensors", write)
        yield go_on
        go_on.set()


@contextmanager
def _full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def write(path: Path, *_: object) -> None:
        path.write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "write_tensors", write)
        yield


def test_the_state_of_the_request_is_saved_while_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tiny_parts()
    train_steps(parts, 2)
    saver = build_saver(tmp_path, parts)
    expected = state_of(parts)
    with _slow_disk(monkeypatch) as go_on:
        assert saver.save_step(epoch=0)
        train_steps(parts, 3)
        assert saver.poll() == []
        go_on.set()
        saver.finish()
    (report,) = saver.poll()
    assert (report.step, report.bytes > 10_000, report.stall_ms > 0) == (2, True, True)
    restored = tiny_parts(seed=1)
    restore(str(tmp_path / "step_00000002"), restored, **PLAN)  # type: ignore[arg-type]
    assert same(state_of(restored), expected)
    assert (restored.state.step, restored.state.samples_seen) == (2, 8)


def test_a_request_while_one_is_being_written_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    with _slow_disk(monkeypatch), caplog.at_level(logging.WARNING):
        assert saver.save_step(epoch=0)
        assert saver.save_step(epoch=0)  # the same state
        train_steps(parts)
        assert not saver.save_step(epoch=0)
    assert saver.dropped == 1
    assert "The save of step 1 is left out: that of step 0 has been written for 0 s" in caplog.text
    saver.finish()
    assert Checkpointer(tmp_path).steps() == [0]


def test_an_epoch_waits_for_the_save_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    with _slow_disk(monkeypatch) as go_on:
        saver.save_step(epoch=0)
        train_steps(parts)
        threading.Timer(0.1, go_on.set).start()
        saver.save_epoch(1)
    saver.finish()
    assert Checkpointer(tmp_path).steps() == [0, 1]
    assert [report.step for report in saver.poll()] == [0, 1]


def test_a_save_that_is_waited_for_is_on_the_disk_and_not_made_twice(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    assert saver.save_now_and_wait(0, "signal")
    before = (tmp_path / "step_00000000").stat().st_ino
    assert saver.save_now_and_wait(0, "exit")
    assert (tmp_path / "step_00000000").stat().st_ino == before


def test_failures_are_counted_reported_and_fatal_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, max_save_failures=2)
    saver.save_now_and_wait(0, "start")
    with _full_disk(monkeypatch), caplog.at_level(logging.ERROR):
        train_steps(parts)
        assert not saver.save_now_and_wait(0, "exit")
        assert saver.failures == 1
        assert "A save failed (1 in a row, 2 end the run): OSError: [Errno 28]" in caplog.text
        with pytest.raises(RuntimeError, match=r"2 saves in a row have failed.*No space left.*--max-save-failures"):
            saver.save_now_and_wait(0, "exit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000000"]


def test_a_save_that_succeeds_forgives_those_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, max_save_failures=2)
    for _ in range(3):
        with _full_disk(monkeypatch):
            assert not saver.save_now_and_wait(0, "exit")
        assert saver.save_now_and_wait(0, "exit")
        train_steps(parts)
    assert saver.failures == 0


def test_a_run_does_not_end_well_if_its_last_save_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = build_saver(tmp_path, tiny_parts())
    with _full_disk(monkeypatch):
        saver.save_epoch(3)
        with pytest.raises(RuntimeError, match=r"The last save of the run failed \(OSError.*free space on"):
            saver.finish()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    with torch.no_grad():
        parts.model.logit_scale.fill_(float("nan"))
    assert not saver.save_now_and_wait(0, "signal")
    with pytest.raises(RuntimeError, match=r"the weights are not finite \('logit_scale'\)"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []


class _Lost(RuntimeError):
    pass


def test_a_lost_run_ends_the_training_at_once(tmp_path: Path) -> None:
    def fence() -> None:
        raise _Lost("generation 8 owns the run")

    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, checkpointer=Checkpointer(tmp_path, fence=fence))
    with pytest.raises(_Lost, match="generation 8"):
        saver.save_now_and_wait(0, "signal")
    assert list(tmp_path.iterdir()) == []


def test_steps_and_minutes_say_when_a_save_is_due(tmp_path: Path) -> None:
    now = [100.0]
    saver = build_saver(tmp_path, tiny_parts(), save_every_n_steps=5, save_every_n_minutes=2.0)
    saver._clock = lambda: now[0]
    saver._last_request = 100.0
    assert [step for step in range(1, 12) if saver.is_due(step)] == [5, 10]
    assert not saver.request_due_by_clock()
    now[0] += 120
    assert [saver.request_due_by_clock() for _ in range(3)] == [True, False, False]
    now[0] += 119
    saver.save_step(epoch=0)
    now[0] += 119
    assert not saver.request_due_by_clock()
    saver.finish()
    never = build_saver(tmp_path, tiny_parts())
    assert not never.is_due(5)
    assert not never.request_due_by_clock()


def test_a_save_that_takes_long_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saver_module, "_OVERDUE_S", 0.0)
    saver = build_saver(tmp_path, tiny_parts())
    with _slow_disk(monkeypatch), caplog.at_level(logging.WARNING):
        saver.save_step(epoch=0)
        saver.poll()
        saver.poll()
    assert caplog.text.count("The save of step 0 has been written for") == 1
    saver.finish()


def test_the_best_by_metric_is_noted_when_its_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tiny_parts()
    checkpointer = Checkpointer(tmp_path)
    saver = build_saver(tmp_path, parts, keep_best="top1", checkpointer=checkpointer)
    with _slow_disk(monkeypatch):
        saver.save_step(epoch=0)
        saver.report_metrics(0, {"top1": 0.5, "other": 1.0})
        assert checkpointer.tags().best is None
    saver.report_metrics(7, {"top1": 0.9})  # its checkpoint was dropped
    saver.report_metrics(0, {"other": 1.0})
    assert "--keep-best top1: the evaluation has only other." in caplog.text
    saver.finish()
    assert checkpointer.tags().best == Best("top1", 0, 0.5)
    for step in range(1, 5):
        train_steps(parts)
        saver.save_now_and_wait(0, "exit")
        saver.report_metrics(step, {"top1": 0.1})
    assert checkpointer.steps() == [0, 3, 4]


def test_a_rewind_takes_the_weights_back_and_the_counters_stay(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, checkpointer=Checkpointer(tmp_path, keep=9))
    states = {}
    for step in (1, 2, 3):
        train_steps(parts)
        states[step] = state_of(parts)
        saver.save_now_and_wait(0, "exit")
    assert saver.tag_good(2)
    assert not saver.tag_good(9)
    train_steps(parts)
    saver.save_step(epoch=0)
    assert saver.can_rewind(onset=3)
    assert saver.rewind(onset=3) == 2
    assert same(state_of(parts), states[2])
    assert (parts.state.step, parts.state.samples_seen) == (4, 16)
    assert Checkpointer(tmp_path).tags().suspect == {3, 4}
    assert saver.save_now_and_wait(0, "rewind")
    assert torch.equal(read_step_checkpoint(tmp_path / "step_00000004").model["visual.proj"], states[2]["visual.proj"])
    assert not saver.can_rewind(onset=1)
    with pytest.raises(DamagedCheckpoint, match="no checkpoint to go back to"):
        saver.rewind(onset=1)


def test_a_run_with_nothing_but_damage_starts_over_only_if_allowed(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts)
    for _ in range(2):
        train_steps(parts)
        saver.save_now_and_wait(0, "exit")
    for weights in tmp_path.glob("step_*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-4] + b"ruin")
    with pytest.raises(DamagedCheckpoint, match=r"None of the 2 .*--allow-restart-from-zero") as caught:
        find_resume_path("latest", checkpoints=tmp_path)
    assert caught.value.exit_code == 93
    assert find_resume_path("latest", checkpoints=tmp_path, allow_restart_from_zero=True) is None
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == [
        "damaged-step_00000001",
        "damaged-step_00000002",
    ]


@pytest.mark.parametrize("readable", [True, False])
def test_a_run_with_nothing_but_damage_goes_on_from_an_epoch_file_before_it_starts_over(
    tmp_path: Path, readable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, save_most_recent=True)
    train_steps(parts)
    saver.save_epoch(1)
    saver.finish()
    weights = tmp_path / "step_00000001/model.safetensors"
    weights.write_bytes(b"")
    (tmp_path / "epoch_latest.pt").unlink()  # the same file by another name
    (tmp_path / "epoch_latest.pt").write_bytes(b"")
    if not readable:
        (tmp_path / "epoch_1.pt").write_bytes(b"")
    expected = str(tmp_path / "epoch_1.pt") if readable else None
    with caplog.at_level(logging.WARNING):
        assert find_resume_path("latest", checkpoints=tmp_path, allow_restart_from_zero=True) == expected
    assert ("Starting from the beginning" in caplog.text) == (not readable)
    assert ("Going on from" in caplog.text) == readable
    assert find_resume_path("latest", checkpoints=tmp_path) == expected, "a later start without permission agrees"
    assert len(list(tmp_path.glob("damaged-*"))) == 2 + (not readable)


def test_a_run_that_starts_again_knows_which_checkpoints_wait_for_a_verdict(tmp_path: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(tmp_path, parts, checkpointer=Checkpointer(tmp_path, keep=9))
    for _ in range(4):
        train_steps(parts)
        saver.save_now_and_wait(0, "exit")
    saver.tag_good(1)
    saver.tag_suspect(4)
    parts.state.step = 2
    assert build_saver(tmp_path, parts).untagged() == [2]
    parts.state.step = 9
    assert build_saver(tmp_path, parts).untagged() == [2, 3]
    assert build_saver(tmp_path, parts, runtime=replace(ALONE, rank=1, world_size=2)).untagged() == []
