"""Rows 9 to 12: a scheduler's signals. All ranks stop after the same step, saved, and the run goes on as if nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.lab import STEPS, Ended, Lab, Record, compare, json_lines
from tests.faults.plan import Fault

SLOW = Fault("step", "sleep", with_={"seconds": 0.1})


def _sentinel(lab: Lab) -> dict[str, object]:
    found: dict[str, object] = json.loads((lab.run_directory("r") / ".requeue.local").read_text())
    return found


def _check_stopped(lab: Lab, ended: Ended, signal_name: str) -> int:
    """Exit code 0, a sentinel, and the step that both name; returns it."""
    assert ended.codes == [0, 0], ended.text[-4000:]
    sentinel = _sentinel(lab)
    assert sentinel["signal"] == signal_name
    assert lab.steps("r")[-1] == sentinel["step"]
    assert max(line["step"] for line in json_lines(lab.run_directory("r") / "metrics.jsonl")) + 1 == sentinel["step"]
    assert not lab.leftovers("r")
    return int(str(sentinel["step"]))


@pytest.mark.parametrize(("name", "rank"), [("SIGUSR1", 1), ("SIGUSR2", 0), ("SIGTERM", 1), ("SIGINT", 0)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    lab: Lab, undisturbed: Callable[..., Record], name: str, rank: int
) -> None:
    """Row 9."""
    ended = lab.run("r", plan=[Fault("step", "send", rank=rank, step=4, with_={"name": name})])
    step = _check_stopped(lab, ended, name)
    assert 5 <= step <= 8  # a step carries the request, and its vitals are read two steps later
    lab.finish("r")
    assert lab.first_step("r") == step
    assert not (lab.run_directory("r") / ".requeue.local").exists()
    compare(undisturbed(), lab.record("r"))


def test_without_the_agreement_a_signal_to_one_rank_stops_nothing(lab: Lab) -> None:
    """Negative control of rows 9 to 12: the ranks do not hear of it."""
    term = Fault("step", "send", rank=1, step=4, with_={"name": "SIGTERM"})
    ended = lab.run("r", plan=[Fault("request", "skip"), term])
    assert ended.codes == [0, 0]
    assert lab.steps("r")[-1] == STEPS
    assert not (lab.run_directory("r") / ".requeue.local").exists()


def test_a_rank_that_gets_ten_seconds_is_saved_within_them(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 10: SIGTERM to all, as SLURM does on preemption; SIGKILL would come ten seconds later."""
    job = lab.start("r", plan=[SLOW])
    lab.wait_for_step("r", 3)
    sent = time.monotonic()
    for rank in (0, 1):
        job.send(rank, signal.SIGTERM)
    ended = job.wait(timeout_s=10)
    assert time.monotonic() - sent < 10
    _check_stopped(lab, ended, "SIGTERM")
    lab.finish("r")
    compare(undisturbed(), lab.record("r"))


def test_a_save_that_takes_longer_than_the_grace_leaves_the_checkpoint_before(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 10: SIGKILL arrives while the last save is being written."""
    slow_save = Fault("write_manifest", "sleep", call=1, with_={"seconds": 20.0})
    term = Fault("step", "send", step=4, with_={"name": "SIGTERM"})
    job = lab.start("r", plan=[*lab.saved("r", 3), slow_save, term])
    lab.wait_for(lambda: lab.steps("r") == [3] and lab.leftovers("r"), what="the second save")
    job.kill()
    assert lab.steps("r") == [3]
    lab.finish("r")
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))


@pytest.mark.parametrize("place", ["sum", "batch"])
def test_a_signal_is_seen_although_the_main_thread_waits(lab: Lab, place: str) -> None:
    """Row 11: the other rank keeps this one waiting in a collective, or its own data do; the log says so at once."""
    wait = Fault("step", "sleep", rank=1, step=4, with_={"seconds": 3.0})
    if place == "batch":
        wait = Fault("batch", "sleep", rank=0, step=4, with_={"seconds": 3.0})
    job = lab.start("r", plan=[*lab.saved("r", 3), wait])
    lab.wait_for_step("r", 3)
    time.sleep(1.0)
    sent = time.monotonic()
    job.send(0, signal.SIGUSR1)
    lab.wait_for(lambda: "SIGUSR1 received" in job.text(0), what="the word of the signal")
    assert time.monotonic() - sent < 1.0
    _check_stopped(lab, job.wait(timeout_s=15), "SIGUSR1")


def test_more_signals_during_the_save_change_nothing(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 12: two USR1, then TERM, all while the last checkpoint is being written."""
    first = Fault("step", "send", rank=0, step=4, with_={"name": "SIGUSR1"})
    more = [
        Fault("write_manifest", "send", call=1, with_={"name": name, "then_s": 0.05}) for name in ("SIGUSR1", "SIGTERM")
    ]
    ended = lab.run("r", plan=[*lab.saved("r", 3), first, *more])
    step = _check_stopped(lab, ended, "SIGUSR1")
    assert ended.text.count(f"step_{step:08d}:") == 1  # saved once
    lab.finish("r")
    compare(undisturbed(), lab.record("r"))


def test_without_the_last_save_the_steps_since_the_one_before_are_lost(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Negative control of rows 9 to 12: the run stops, but nobody saves."""
    term = Fault("step", "send", rank=1, step=4, with_={"name": "SIGTERM"})
    ended = lab.run("r", plan=[*lab.saved("r", 3), term, Fault("save_and_wait", "skip", with_={"value": True})])
    assert ended.codes == [0, 0]
    assert lab.steps("r")[-1] != _sentinel(lab)["step"]
