"""Rows 38 to 42: starts with other ranks or other settings, and starts that meet another one in their directory."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.lab import STEPS, Job, Lab, Record, compare
from tests.faults.plan import Fault

BAD_USAGE = 2
SLOTS, SLOT_SAMPLES = 16, 6
"""The four shards are read in four parts each."""
TWO_EPOCHS = ("--epochs", "2")
NOT_RESTORED = Fault("load_position", "skip")


def _legs(lab: Lab, *plan: Fault) -> Counter[tuple[int, int]]:
    """On four, two, three ranks, stopped by a signal each time, then to the end on one; how often each sample came."""
    for place, world_size in enumerate((4, 2, 3)):
        step = 2 * place  # where the leg before has ended, or before it
        term = Fault("step", "send", rank=0, step=step, until=99, with_={"name": "SIGTERM"})
        lab.finish("r", *TWO_EPOCHS, world_size=world_size, plan=[term, *(plan if place else ())])
    lab.finish("r", *TWO_EPOCHS, world_size=1, plan=plan)
    records = lab.record("r").samples.values()
    return Counter((slot, index) for samples in records for _, slot, index in samples)


def test_on_four_two_three_and_one_ranks_every_sample_of_the_epoch_comes_once(lab: Lab) -> None:
    """Row 38."""
    seen = _legs(lab)
    assert {sample for sample in seen if sample[0] < SLOTS} == {
        (slot, index) for slot in range(SLOTS) for index in range(SLOT_SAMPLES)
    }
    assert set(seen.values()) == {1}
    losses = lab.record("r").losses
    assert sorted(losses) == list(range(len(losses)))
    assert max(losses.values()) < 4.0  # a fresh start on four ranks begins at 2.8


def test_without_the_place_in_the_data_samples_come_twice(lab: Lab) -> None:
    """Negative control of row 38."""
    assert max(_legs(lab, NOT_RESTORED).values()) > 1


def _stop_early(lab: Lab) -> int:
    """A run that a signal has stopped; its step."""
    lab.finish("r", plan=[Fault("step", "send", rank=0, step=3, with_={"name": "SIGTERM"})])
    return lab.steps("r")[-1]


@pytest.mark.parametrize(
    "change", [("--wd", "0.1"), ("--warmup", "5"), ("--epochs", "2")], ids=lambda change: change[0]
)
def test_a_setting_that_makes_another_run_is_refused_with_the_difference(lab: Lab, change: tuple[str, str]) -> None:
    """Row 39."""
    step = _stop_early(lab)
    ended = lab.run("r", *change)
    assert ended.codes == [BAD_USAGE, BAD_USAGE]
    assert change[0] in ended.text
    assert f"--allow-config-change {change[0].removeprefix('--')}" in ended.text
    assert lab.steps("r")[-1] == step


def test_a_setting_that_may_change_is_recorded(lab: Lab) -> None:
    """Row 39: what is named, and what always may."""
    step = _stop_early(lab)
    lab.finish("r", "--wd", "0.1", "--lr", "2e-3", "--allow-config-change", "wd")
    assert lab.first_step("r") == step
    changes = json.dumps(lab.last_start("r")["changes"])
    assert "wd" in changes
    assert "lr" in changes


def test_without_the_comparison_another_setting_goes_unnoticed(lab: Lab) -> None:
    """Negative control of row 39."""
    step = _stop_early(lab)
    lab.finish("r", "--wd", "0.1", plan=[Fault("compare_config", "same_config")])
    assert lab.first_step("r") == step


def test_other_shards_begin_a_new_stream_that_is_recorded(lab: Lab, fault_data: Path) -> None:
    """Row 40: an explicit new data epoch, never the old place in another list."""
    step = _stop_early(lab)
    fewer = f"{fault_data}/shards/{{000..002}}.tar"
    ended = lab.run("r", "--train-data", fewer)
    if ended.codes == [0, 0]:
        assert "train_data" in json.dumps(lab.last_start("r")["changes"])
        steps = {step_ for samples in lab.record("r").samples.values() for step_, _, _ in samples}
        assert steps == set(range(max(steps) + 1))
    else:
        assert ended.codes == [BAD_USAGE, BAD_USAGE]
        assert "belongs to another stream" in ended.text
        assert lab.steps("r")[-1] == step


def test_the_same_shards_in_another_order_are_another_stream(lab: Lab, fault_data: Path) -> None:
    """Row 40: a place in a list means nothing in another one."""
    _stop_early(lab)
    reordered = "::".join(f"{fault_data}/shards/{shard:03d}.tar" for shard in (3, 2, 1, 0))
    ended = lab.run("r", "--train-data", reordered)
    assert ended.codes == [BAD_USAGE, BAD_USAGE] or "train_data" in json.dumps(lab.last_start("r")["changes"])


HELD = Fault("step", "send", step=7, with_={"name": "SIGSTOP"})
PATIENT = ("--timeout-step", "120")


def _held_job(lab: Lab) -> Job:
    """A job whose ranks are all stopped in step 7, with checkpoints of 3 and 6."""
    job = lab.start("r", *PATIENT, plan=[*lab.saved("r", 3, 6), HELD])
    lab.wait_for_step("r", 6)
    lab.wait_for(lambda: all(_state(pid) == "T" for pid in job.pids), what="the stop")
    return job


def _wake(job: Job) -> None:
    for rank in (0, 1):
        job.send(rank, signal.SIGCONT)


def test_a_second_job_of_the_same_run_refuses_and_names_the_first(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 41."""
    job = _held_job(lab)
    ended = lab.run("r", *PATIENT)
    assert ended.codes == [BAD_USAGE, BAD_USAGE]
    assert f"run r is in use by process {job.pids[0]} on" in ended.text
    assert "--take-over" in ended.text
    _wake(job)
    assert job.wait().codes == [0, 0]
    compare(undisturbed(), lab.record("r"))


def test_without_the_look_at_the_owner_two_jobs_share_a_directory(lab: Lab) -> None:
    """Negative control of row 41: and the fence sees that the run was taken."""
    job = _held_job(lab)
    lab.finish("r", *PATIENT, plan=[Fault("is_ended", "skip")])
    _wake(job)
    assert job.wait().codes != [0, 0]


def test_a_job_that_wakes_up_after_another_took_over_writes_nothing(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 42."""
    job = _held_job(lab)
    lab.finish("r", *PATIENT, "--take-over")
    _wake(job)
    ended = job.wait()
    assert 0 not in ended.codes
    assert "belongs to generation 2 now" in ended.text
    generations = [_manifest(lab, step)["generation"] for step in lab.steps("r")]
    assert generations == sorted(generations)
    assert generations[-1] == 2
    assert not lab.leftovers("r")
    compare(undisturbed(), lab.record("r"))


def test_without_the_fence_the_older_job_goes_on_writing(lab: Lab) -> None:
    """Negative control of row 42."""
    job = lab.start("r", *PATIENT, plan=[*lab.saved("r", 3, 6), HELD, Fault("fence", "skip")])
    lab.wait_for_step("r", 6)
    lab.wait_for(lambda: all(_state(pid) == "T" for pid in job.pids), what="the stop")
    lab.finish("r", *PATIENT, "--take-over")
    _wake(job)
    assert job.wait().codes == [0, 0]
    assert _manifest(lab, STEPS)["generation"] == 1


def _manifest(lab: Lab, step: int) -> dict[str, int]:
    found: dict[str, int] = json.loads((lab.checkpoint("r", step) / "MANIFEST.json").read_text())
    return found


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
