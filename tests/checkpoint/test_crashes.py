"""Signal 9 at any moment, and disks that are full, small or read-only: what was there stays, and is found."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.checkpoint import jobs
from tests.checkpoint.tiny_run import ALONE, build_saver, tiny_parts, train_steps
from tests.distributed.launch import run_ranks, start_ranks
from training.checkpoint import exchange
from training.checkpoint import saver as saver_module
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.export import read_epoch_file
from training.checkpoint.manifest import read_manifest, verify
from training.checkpoint.run_state import find_resume_path, restore

PHASES = ["the first file", "the receipts", "the manifest", "reading back", "the rename", "the hint", "retention"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_dies_in_a_save_has_the_one_before_or_the_new_one(tmp_path: Path, phase: str) -> None:
    (process,) = start_ranks(1, jobs.die_when, str(tmp_path), phase)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    checkpointer = Checkpointer(tmp_path)
    step = 2 if phase in ("the hint", "retention") else 1
    assert checkpointer.newest() == checkpointer.path(step)
    assert len(checkpointer.clean_up()) == (step == 1)
    assert not list(tmp_path.glob(".tmp-*"))


def die_between_the_renames(root: str) -> None:
    """Replaces step 1 where directories cannot change names at once."""
    parts = tiny_parts()
    train_steps(parts)
    build_saver(Path(root), parts).save_now_and_wait(0, "exit")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-00000001") and target.name == "step_00000001":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, target)

    exchange._exchange_at_once = lambda *_: False  # type: ignore[assignment]
    Path.rename = rename  # type: ignore[assignment, method-assign]
    build_saver(Path(root), parts).save_now_and_wait(0, "exit")


def test_a_run_that_dies_between_two_renames_has_its_checkpoint_again_at_the_next_start(tmp_path: Path) -> None:
    (process,) = start_ranks(1, die_between_the_renames, str(tmp_path))
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.newest() is None
    checkpointer.clean_up()
    assert checkpointer.newest() == checkpointer.path(1)
    assert not list(tmp_path.glob(".tmp-*"))


def die_before_the_export(root: str) -> None:
    """In the background, as soon as the epoch's step is on the disk."""
    parts = tiny_parts()
    train_steps(parts)
    saver = build_saver(Path(root), parts, save_most_recent=True)
    saver_module.write_epoch_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    saver.save_epoch(1)
    saver.finish()


def test_epoch_files_that_a_start_died_before_are_made_by_the_next_one(tmp_path: Path) -> None:
    (process,) = start_ranks(1, die_before_the_export, str(tmp_path))
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.pt"))
    parts = tiny_parts(seed=1)
    path = find_resume_path("latest", checkpoints=tmp_path)
    assert path is not None
    restore(path, parts, runtime=ALONE, steps_per_epoch=1, samples_per_step=4)
    saver = build_saver(tmp_path, parts, save_most_recent=True)
    saver.export_owed(1)
    saver.finish()
    for name in ("epoch_1.pt", "epoch_latest.pt"):
        read = read_epoch_file(str(tmp_path / name))
        assert (read.epoch, torch.equal(read.state_dict["visual.proj"], parts.model.state_dict()["visual.proj"])) == (
            1,
            True,
        )


def _wait_for_a_step_after(step: int, root: Path) -> None:
    deadline = time.monotonic() + 30
    while max(Checkpointer(root).steps(), default=0) <= step:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)


def test_twelve_kills_at_random_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    random.seed(0)
    newest = 0
    for _ in range(12):
        (process,) = start_ranks(1, jobs.train_for_ever, str(tmp_path))
        _wait_for_a_step_after(newest, tmp_path)
        time.sleep(random.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps = Checkpointer(tmp_path).steps()
        for step in steps:
            assert read_manifest(Checkpointer(tmp_path).path(step)).step == step
            verify(Checkpointer(tmp_path).path(step))
        assert max(steps) > newest
        newest = max(steps)
    assert len(Checkpointer(tmp_path).steps()) <= 3  # a kill between a commit and its retention


def test_a_file_that_cannot_grow_is_a_failed_save_and_the_next_one_works(tmp_path: Path) -> None:
    (fault,) = run_ranks(1, jobs.save_beyond_the_limit, str(tmp_path))
    assert "File too large" in fault
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000000", "step_00000002"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1,000 KiB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_there_and_takes_the_next_when_there_is_space(small_disk: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(small_disk, parts)
    assert saver.save_now_and_wait(0, "exit"), "one checkpoint fits"
    (small_disk / "other").write_bytes(bytes(600_000))
    train_steps(parts)
    assert not saver.save_now_and_wait(0, "exit")
    assert "No space left on device" in saver._last_fault
    verify(small_disk / "step_00000000")
    assert not list(small_disk.glob(".tmp-*"))
    (small_disk / "other").unlink()
    assert saver.save_now_and_wait(0, "exit")


def test_a_directory_that_cannot_be_written_is_a_failed_save(small_disk: Path) -> None:
    saver = build_saver(small_disk, tiny_parts())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert not saver.save_now_and_wait(0, "exit")
    assert "Read-only file system" in saver._last_fault
