"""Row 8: a process that is killed while it uploads, and a run whose directory is lost."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.lab import Lab, Record, compare
from tests.faults.plan import Fault

KILLED = -signal.SIGKILL


@pytest.fixture
def remote(lab: Lab) -> Path:
    """Where runs are mirrored to: any fsspec URL will do, and tests/checkpoint/test_mirror.py has S3."""
    directory = lab.root / "remote"
    directory.mkdir()
    return directory


def _flags(remote: Path) -> list[str]:
    return ["--remote-sync", f"file://{remote}", "--remote-sync-protocol", "fsspec", "--remote-sync-frequency", "1"]


def _whole(remote: Path) -> list[str]:
    return sorted(path.parent.name for path in remote.rglob("MANIFEST.json"))


def _killed_in_upload(lab: Lab, remote: Path, *more: Fault) -> None:
    """Killed when the files of the first checkpoint are on their way, and training waits for that."""
    wait = Fault("step", "sleep", step=5, with_={"seconds": 30.0})
    ended = lab.run("r", *_flags(remote), plan=[*lab.saved("r", 3), wait, *more])
    assert ended.codes[0] == KILLED


def test_a_kill_during_an_upload_leaves_no_remote_checkpoint_and_the_next_start_makes_it_whole(
    lab: Lab, undisturbed: Callable[..., Record], remote: Path
) -> None:
    _killed_in_upload(lab, remote, Fault("upload", "kill", rank=0, call=1))
    assert any(remote.rglob("step_00000003/*"))  # on its way
    assert _whole(remote) == []
    lab.finish("r", *_flags(remote))
    assert _whole(remote) == [f"step_{step:08d}" for step in lab.steps("r")]
    compare(undisturbed(), lab.record("r"))


def test_a_run_whose_directory_is_lost_goes_on_from_its_mirror(
    lab: Lab, undisturbed: Callable[..., Record], remote: Path
) -> None:
    job = lab.start(
        "r", *_flags(remote), plan=[*lab.saved("r", 3), Fault("step", "sleep", step=5, with_={"seconds": 30.0})]
    )
    lab.wait_for(lambda: _whole(remote) == ["step_00000003"], what="the mirrored checkpoint")
    job.kill()
    shutil.rmtree(lab.run_directory("r"))
    lab.finish("r", *_flags(remote))
    assert lab.first_step("r") == 3
    assert lab.record("r").weights == undisturbed().weights


def test_a_mirror_that_fails_holds_no_step(lab: Lab, undisturbed: Callable[..., Record], remote: Path) -> None:
    ended = lab.finish("r", *_flags(remote), plan=[Fault("upload", "fail_with_errno", call=0, with_={"name": "EIO"})])
    assert "failed" in ended.text
    compare(undisturbed(), lab.record("r"))


def test_a_manifest_that_comes_first_makes_a_checkpoint_of_nothing(lab: Lab, remote: Path) -> None:
    """Negative control: the files are left out, and the mirror claims to be whole."""
    _killed_in_upload(lab, remote, Fault("upload", "skip"), Fault("upload_step", "kill", rank=0, after=True))
    assert _whole(remote) == ["step_00000003"]
    shutil.rmtree(lab.run_directory("r"))
    assert lab.run("r", *_flags(remote)).codes != [0, 0]
