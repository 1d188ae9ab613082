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


def _other_data(data: Path, kind: str) -> str:
    """Another list of the same shards."""
    if kind == "fewer":
        return f"{data}/shards/{{000..002}}.tar"
    return "::".join(f"{data}/shards/{shard:03d}.tar" for shard in (3, 2, 1, 0))


@pytest.mark.parametrize("kind", ["fewer", "reordered"])
def test_other_shards_begin_a_new_stream_that_is_recorded(lab: Lab, fault_data: Path, kind: str) -> None:
    """Row 40: a place in a list means nothing in another one, so it is read from its beginning, and that is said."""
    step = _stop_early(lab)
    ended = lab.finish("r", "--train-data", _other_data(fault_data, kind))
    start = lab.last_start("r")
    assert start["step"] == step
    assert "train_data" in start["changes"]
    assert start["new_data"]["unread_samples"] == 96 - 8 * step
    assert "of the old data stay unread" in ended.text
    new = [sample for samples in lab.record("r").samples.values() for sample in samples if sample[0] >= step]
    assert len({sample[1:] for sample in new}) == len(new)


@pytest.mark.parametrize("kind", ["fewer", "reordered"])
def test_without_the_comparison_the_loader_itself_refuses_another_list(lab: Lab, fault_data: Path, kind: str) -> None:
    """Negative control of row 40: and behind that protection there is another one."""
    _stop_early(lab)
    ended = lab.run("r", "--train-data", _other_data(fault_data, kind), plan=[Fault("compare_config", "same_config")])
    assert ended.codes == [BAD_USAGE, BAD_USAGE]
    assert "another stream" in ended.text
    lab.run(
        "r", "--train-data", _other_data(fault_data, kind), plan=[Fault("compare_config", "same_config"), NOT_RESTORED]
    )
    assert lab.last_start("r").get("new_data") is None


def test_a_job_that_crashes_at_the_same_step_again_and_again_is_not_requeued(lab: Lab) -> None:
    """Row 44."""
    job, crash = {"SLURM_JOB_ID": "77"}, [Fault("step", "fail", step=1)]
    codes = [lab.run("r", world_size=1, plan=crash, environment=job).codes[0] for _ in range(5)]
    assert codes == [1, 1, 1, 93, 93]
    other = {"SLURM_JOB_ID": "78"}  # submitted anew: somebody has looked at it
    lab.finish("r", world_size=1, environment=other)


def test_without_the_history_a_crash_loop_goes_on(lab: Lab) -> None:
    """Negative control of row 44."""
    plan = [Fault("step", "fail", step=1), Fault("crashed_starts", "skip", with_={"value": 0})]
    codes = [lab.run("r", world_size=1, plan=plan, environment={"SLURM_JOB_ID": "77"}).codes[0] for _ in range(5)]
    assert codes == [1] * 5


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
