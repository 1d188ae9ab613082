"""Rows 30 to 34 and 52: numbers that go wrong, on one rank or on all. A bad step changes nothing, on no rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.lab import Disagreement, Lab, Nursery, Record, compare, events
from tests.faults.plan import Fault
from training.checkpoint.checkpointer import read_step_checkpoint

BAD_STEP = 5
EVERY_STEP = ("--checksum-every-n-steps", "1")
"""The ranks' weights are compared after every step: a step that one rank alone skips ends the run with code 95."""
BAD_STEPS = {
    "NaN in a pixel of one rank (row 30)": Fault(
        "step", "spoil_image", rank=1, step=BAD_STEP, with_={"value": float("nan")}
    ),
    "infinity in a pixel of one rank (row 30)": Fault(
        "step", "spoil_image", rank=0, step=BAD_STEP, with_={"value": float("inf")}
    ),
    "infinite gradients on one rank after the exchange (row 31)": Fault(
        "update", "scale_gradients", rank=1, step=BAD_STEP, with_={"factor": float("inf")}
    ),
}
LEFT_OUT = Fault("update", "leave_out", step=BAD_STEP)
"""What a bad step is compared with: a run that reads the same batch and does not learn from it."""


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, fault_data: Path) -> Record:
    """The record of such a run."""
    lab = Lab(tmp_path_factory.mktemp("left-out"), nursery, data=fault_data)
    lab.finish("r", plan=[LEFT_OUT])
    return lab.record("r")


def _check_skipped(lab: Lab, left_out: Record) -> None:
    (event,) = events(lab.run_directory("r"), "skipped")
    assert event["step"] == BAD_STEP
    assert event["samples"]
    losses = lab.record("r").losses
    compare(left_out, lab.record("r")._replace(losses={**losses, BAD_STEP: left_out.losses[BAD_STEP]}))


@pytest.mark.parametrize("kind", BAD_STEPS)
def test_a_bad_step_changes_nothing_on_any_rank(lab: Lab, left_out: Record, kind: str) -> None:
    lab.finish("r", *EVERY_STEP, plan=[BAD_STEPS[kind]])
    _check_skipped(lab, left_out)


def test_without_the_guard_a_bad_pixel_ruins_the_weights(lab: Lab) -> None:
    """Negative control of row 30: and then no checkpoint is written any more."""
    ended = lab.run("r", *EVERY_STEP, "--guard", "off", plan=[next(iter(BAD_STEPS.values())), *lab.saved("r", 3)])
    assert ended.codes != [0, 0]
    assert "the weights are not finite" in ended.text
    assert lab.steps("r") == [3]


HUGE = Fault("update", "scale_gradients", rank=1, step=BAD_STEP, with_={"factor": 1e4})
QUICK = ("--guard-warmup", "4", "--guard-grad-z", "5")
"""Gradients of the first steps vary by a factor of ten."""


def test_gradients_that_are_huge_on_one_rank_alone_are_skipped_on_all(lab: Lab, left_out: Record) -> None:
    """Row 31: 1e4 times what they should be, after the ranks have exchanged them."""
    lab.finish("r", *EVERY_STEP, *QUICK, plan=[HUGE])
    _check_skipped(lab, left_out)


@pytest.mark.parametrize("off", ["guard off", "verdict of each rank alone"])
def test_without_the_common_verdict_the_replicas_part(lab: Lab, off: str) -> None:
    """Negative control of row 31, and of row 52: the comparison of the replicas sees it."""
    more = ["--guard", "off"] if off == "guard off" else []
    alone = [] if more else [Fault("judge", "judge_alone")]
    ended = lab.run("r", *EVERY_STEP, *QUICK, *more, plan=[HUGE, *alone])
    assert ended.codes == [95, 95]
    assert "differ from the others'" in ended.text


FLIPPED = Fault("step", "flip_bit", rank=1, step=4, after=True)


def test_a_flipped_bit_in_one_replica_stops_the_run_with_the_ranks_named(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 52. The next start is undisturbed again: from a checkpoint of before."""
    more = ("--checksum-every-n-steps", "2")
    ended = lab.run("r", *more, plan=[*lab.saved("r", 3), FLIPPED])
    assert ended.codes == [95, 95]
    (event,) = events(lab.run_directory("r"), "replicas differ")
    assert event["step"] <= 6
    assert event["equal_until"] == 4
    lab.finish("r", *more)
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))


def test_a_flipped_bit_can_be_rewound_in_process(lab: Lab) -> None:
    """Row 52 with ``--on-divergence rewind``: the replicas are equal again."""
    more = ("--checksum-every-n-steps", "2", "--on-divergence", "rewind")
    lab.finish("r", *more, plan=[*lab.saved("r", 3), FLIPPED])
    assert len(events(lab.run_directory("r"), "replicas differ")) == 1
    assert events(lab.run_directory("r"), "rewound")[0]["to_step"] == 3


def test_without_the_comparison_a_flipped_bit_stays(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Negative control of row 52."""
    lab.finish("r", "--checksum-every-n-steps", "0", plan=[FLIPPED])
    with pytest.raises(Disagreement):
        compare(undisturbed(), lab.record("r"))


SPOILED = Fault("capture", "spoil_weight", call=1)


def test_weights_that_are_no_numbers_are_not_saved_as_a_checkpoint(lab: Lab) -> None:
    """Row 34: on both ranks alike, so that only the look at the values can tell."""
    ended = lab.run("r", plan=[*lab.saved("r", 3), SPOILED])
    assert "the weights are not finite" in ended.text
    assert lab.steps("r") == [3]


def test_a_checkpoint_with_weights_that_are_no_numbers_is_passed_over(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 34: its files are as they were written."""
    unseen = Fault("share_is_finite", "skip")
    job = lab.start(
        "r", plan=[*lab.saved("r", 3), SPOILED, unseen, Fault("step", "sleep", step=7, with_={"seconds": 20.0})]
    )
    lab.wait_for_step("r", 6)
    job.kill()
    assert not _is_finite(lab.checkpoint("r", 6))
    lab.finish("r")
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))


def test_without_the_look_at_the_values_a_ruined_checkpoint_is_taken(lab: Lab) -> None:
    """Negative control of row 34."""
    blind = [Fault("share_is_finite", "skip"), Fault("is_finite", "skip", with_={"value": True})]
    job = lab.start(
        "r", plan=[*lab.saved("r", 3), SPOILED, *blind, Fault("step", "sleep", step=7, with_={"seconds": 20.0})]
    )
    lab.wait_for_step("r", 6)
    job.kill()
    lab.run("r", plan=blind)
    assert lab.first_step("r") == 6


def _is_finite(checkpoint: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in read_step_checkpoint(checkpoint).model.values())
