"""Signal 9 at any moment, and disks that are full, small or read-only: what was there stays, and is found."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.checkpoint import jobs
from tests.checkpoint.tiny_run import build_saver, tiny_parts, train_steps
from tests.distributed.launch import run_ranks, start_ranks
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import read_manifest, verify

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
