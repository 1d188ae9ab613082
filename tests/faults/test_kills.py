"""Rows 1 to 7, 44, 45 and 53: processes that are killed, and what the next start makes of what they left."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence

import pytest

from tests.faults.lab import Disagreement, Lab, Record, compare, starts
from tests.faults.plan import Fault

EXIT_S = 5.0
"""How soon after the first death the last rank of a job has ended."""
KILLED = -signal.SIGKILL
NOT_RESTORED = Fault("load_position", "skip")
"""The protection of rows 1 to 3 is off: a start takes the weights, but not the place in the data."""


def _kill_at(lab: Lab, rank: int, *, step: int = 8) -> list[Fault]:
    """Kills a rank when the checkpoint of step 6 is on the disk."""
    return [*lab.saved("r", 3, 6), Fault("step", "kill", rank=rank, step=step)]


@pytest.mark.parametrize("rank", [1, 0], ids=["rank 1 (row 1)", "rank 0, the store's host (row 2)"])
def test_a_killed_rank_ends_the_job_and_the_next_start_loses_nothing(
    lab: Lab, undisturbed: Callable[..., Record], rank: int
) -> None:
    ended = lab.run("r", plan=_kill_at(lab, rank))
    assert ended.codes[rank] == KILLED
    assert ended.codes[1 - rank] not in (0, KILLED)
    assert ended.spread_s < EXIT_S
    assert "ended without a Python error" in ended.text or "gone without a word" in ended.text
    lab.finish("r")
    assert lab.first_step("r") == 6  # of 8: steps are replayed since the last checkpoint only
    compare(undisturbed(), lab.record("r"))


def test_without_the_place_in_the_data_a_restart_is_another_run(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Negative control of rows 1 to 3."""
    lab.run("r", plan=_kill_at(lab, 1))
    lab.finish("r", plan=[NOT_RESTORED])
    with pytest.raises(Disagreement, match="samples of rank 0 differ"):
        compare(undisturbed(), lab.record("r"))


def test_all_ranks_killed_at_random_moments_again_and_again(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 3, in short: the soak does it for minutes."""
    seed = 11
    moments = random.Random(seed)
    for _ in range(4):
        job = lab.start("r", plan=[Fault("step", "sleep", with_={"seconds": 0.05})])
        time.sleep(moments.uniform(0.3, 2.5))
        job.kill()
    lab.finish("r")
    first_steps = [start["step"] for start in starts(lab.run_directory("r"))]
    assert first_steps == sorted(first_steps), f"seed {seed}"
    compare(undisturbed(), lab.record("r"))


DURING_A_SAVE = {
    "while data are written (row 4)": (Fault("write_file", "kill", rank=0, call=5), 3),
    "before the manifest": (Fault("write_manifest", "kill", rank=0, call=1), 3),
    "between manifest and rename (row 5)": (Fault("rename", "kill", rank=0, call=1), 3),
    "after the rename, before LATEST (row 6)": (Fault("hint", "kill", rank=0, call=1), 6),
    "before old ones are deleted (row 6)": (Fault("retention", "kill", rank=0, call=1), 6),
}


def _during_second_save(lab: Lab, *faults: Fault) -> Sequence[Fault]:
    """The first save is finished before the second one begins; training then waits for the kill."""
    wait = Fault("step", "sleep", step=7, with_={"seconds": 20.0})
    return [*lab.saved("r", 3), wait, *faults]


@pytest.mark.parametrize("moment", DURING_A_SAVE)
def test_a_kill_during_a_save_leaves_the_checkpoint_before_or_the_new_one(
    lab: Lab, undisturbed: Callable[..., Record], moment: str
) -> None:
    fault, resumed_at = DURING_A_SAVE[moment]
    ended = lab.run("r", plan=_during_second_save(lab, fault))
    assert ended.codes[0] == KILLED
    assert bool(lab.leftovers("r")) == (resumed_at == 3)
    lab.finish("r")
    assert lab.first_step("r") == resumed_at
    compare(undisturbed(), lab.record("r"))


def test_a_save_in_place_that_is_killed_leaves_a_step_that_is_none(lab: Lab) -> None:
    """Negative control of rows 4 and 5: files are written where readers look, and the next start stumbles over them."""
    in_place = Fault("new_staging", "save_in_place")
    wait = Fault("step", "sleep", step=4, with_={"seconds": 20.0})
    lab.run("r", plan=[in_place, wait, Fault("write_manifest", "kill", rank=0)])
    assert lab.steps("r") == [3]
    assert not lab.leftovers("r")
    assert lab.run("r").codes == [93, 93]


def test_a_reader_that_believed_the_hint_would_take_the_older_one(lab: Lab) -> None:
    """Negative control of row 6."""
    lab.run("r", plan=_during_second_save(lab, Fault("hint", "kill", rank=0, call=1)))
    lab.finish("r", plan=[Fault("candidates", "follow_hint")])
    assert lab.first_step("r") == 3


TWO_WRITERS = Fault("choose_writers", "skip", with_={"value": [0, 1]})


def test_a_rank_killed_while_it_writes_its_part_leaves_no_mixed_checkpoint(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 7."""
    ended = lab.run("r", plan=[*_during_second_save(lab, Fault("write_file", "kill", rank=1, call=3)), TWO_WRITERS])
    assert ended.codes[1] == KILLED
    assert ended.spread_s < EXIT_S
    assert lab.steps("r") == [3]
    assert (lab.checkpoint("r", 3) / "model-00001-of-00002.safetensors").exists()
    lab.finish("r", plan=[TWO_WRITERS])
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))


def test_without_receipts_a_part_that_is_missing_is_not_noticed(lab: Lab) -> None:
    """Negative control of row 7: rank 0 commits what it finds, before rank 1 has written its moments."""
    slow = Fault("write_file", "sleep", rank=1, call=3, with_={"seconds": 20.0})
    weights = {"after": "model-00001-of-00002.safetensors"}
    trusting = Fault("receipts", "trust_what_is_there", call=1, with_=weights)  # the first save is a good one
    job = lab.start("r", plan=[*_during_second_save(lab, slow), TWO_WRITERS, trusting])
    lab.wait_for_step("r", 6)
    job.kill()
    assert lab.run("r", plan=[TWO_WRITERS]).codes != [0, 0]


def test_a_start_that_is_killed_while_it_loads_changes_nothing(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 45: a fault within the recovery from another one."""
    lab.run("r", plan=_kill_at(lab, 1))
    assert lab.run("r", plan=[Fault("load", "kill", rank=0, after=True)]).codes[0] == KILLED
    assert lab.run("r", plan=[Fault("open_file", "kill", rank=1)]).codes[1] == KILLED
    lab.finish("r")
    compare(undisturbed(), lab.record("r"))


def test_a_checkpoint_that_is_damaged_while_another_is_loaded_is_passed_over(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 45: the newest turns out to be damaged on a rank that had begun to load it."""
    lab.run("r", plan=_kill_at(lab, 1))
    lab.finish("r", plan=[Fault("open_file", "damaged", rank=1, call=0)])
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))
