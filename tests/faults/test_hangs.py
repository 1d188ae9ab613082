"""Rows 13, 14 and 29: ranks that hang, and who ends the job for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.faults.lab import Lab, Record, compare
from tests.faults.plan import Fault

TIMEOUT_S = 3.0
PATIENCE = ("--timeout-step", str(TIMEOUT_S))
NODE_SUSPECTED = 95
HANGS = {
    "stopped": Fault("step", "send", rank=1, step=7, with_={"name": "SIGSTOP"}),
    "stopped, the store's host": Fault("step", "send", rank=0, step=7, with_={"name": "SIGSTOP"}),
    "asleep": Fault("step", "sleep", rank=1, step=7, with_={"seconds": 60.0}),
}


def _culprit(kind: str) -> int:
    return HANGS[kind].rank or 0


@pytest.mark.parametrize("kind", HANGS)
def test_a_rank_that_hangs_is_named_and_the_job_ends(lab: Lab, undisturbed: Callable[..., Record], kind: str) -> None:
    """Row 13. Exit within the timeout and ten seconds; the stopped process is killed by its neighbour."""
    culprit = _culprit(kind)
    job = lab.start("r", *PATIENCE, plan=[*lab.saved("r", 3, 6), HANGS[kind]])
    lab.wait_for_step("r", 6)
    saved = time.monotonic()
    ended = job.wait(timeout_s=40)
    assert time.monotonic() - saved < TIMEOUT_S + 10
    assert ended.codes[1 - culprit] == NODE_SUSPECTED
    assert ended.codes[culprit] != 0
    assert f"rank {culprit} failed first" in ended.text
    hangs = lab.run_directory("r") / "hangs"
    assert (hangs / f"rank_{1 - culprit}.txt").exists()
    assert (hangs / f"rank_{1 - culprit}.collectives.json").exists()
    lab.finish("r", *PATIENCE)
    compare(undisturbed(), lab.record("r"))


def test_without_the_watchdog_a_stopped_rank_holds_the_job(lab: Lab) -> None:
    """Negative control of row 13."""
    job = lab.start("r", *PATIENCE, plan=[HANGS["stopped"], Fault("watch", "skip")])
    lab.wait_for_step("r", 3)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not end"):
        job.wait(timeout_s=TIMEOUT_S + 10)


HEARTBEAT_S = 2.0
HEARTBEAT = ("--timeout-heartbeat", str(HEARTBEAT_S), "--timeout-step", "40")
HOLD = Fault("step", "hold_interpreter", rank=1, step=7, with_={"seconds": 60})


def test_a_rank_whose_interpreter_is_held_is_killed_from_outside(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 14."""
    job = lab.start("r", *HEARTBEAT, plan=[*lab.saved("r", 3, 6), HOLD])
    lab.wait_for_step("r", 6)
    saved = time.monotonic()
    ended = job.wait(timeout_s=30)
    assert time.monotonic() - saved < 2 * HEARTBEAT_S + 6  # to write the stacks, and to end the job
    assert ended.codes == [NODE_SUSPECTED, -9]
    assert "native code holds the interpreter" in ended.text
    assert "hold_interpreter" in (lab.run_directory("r") / "hangs/rank_1.txt").read_text()
    lab.finish("r", *HEARTBEAT)
    compare(undisturbed(), lab.record("r"))


def test_without_the_monitor_a_held_interpreter_goes_unseen(lab: Lab) -> None:
    """Negative control of row 14."""
    job = lab.start("r", "--timeout-heartbeat", "0", "--timeout-step", "40", plan=[HOLD])
    lab.wait_for_step("r", 3)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not end"):
        job.wait(timeout_s=2 * HEARTBEAT_S + 6)


def test_a_writer_that_is_slow_does_not_hold_the_steps(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 29: a disk that takes four seconds for a save."""
    slow = Fault("write_manifest", "sleep", call=0, with_={"seconds": 4.0})
    began = [
        Fault("step", "touch", step=step, rank=0, with_={"path": str(lab.root / f"step-{step}")}) for step in (2, 11)
    ]
    ended = lab.finish("r", plan=[slow, *began])
    took = (lab.root / "step-11").stat().st_mtime - (lab.root / "step-2").stat().st_mtime
    assert took < 3.0
    assert "The save of step 6 is left out" in ended.text
    compare(undisturbed(), lab.record("r"))


def test_a_save_that_training_waits_for_holds_the_steps(lab: Lab) -> None:
    """Negative control of row 29: nothing runs in the background."""
    slow = Fault("write_manifest", "sleep", call=0, with_={"seconds": 4.0})
    began = [
        Fault("step", "touch", step=step, rank=0, with_={"path": str(lab.root / f"step-{step}")}) for step in (2, 11)
    ]
    foreground = Fault("background", "wait_for_writer", after=True)
    job = lab.start("r", plan=[slow, *began, foreground])
    job.wait()
    took = (lab.root / "step-11").stat().st_mtime - (lab.root / "step-2").stat().st_mtime
    assert took > 4.0
