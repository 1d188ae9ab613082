"""Decisions that meet each other: a signal and a divergence, trouble in the last steps, a guard turned off later."""

from __future__ import annotations

from tests.faults.lab import STEPS, Lab, events, json_lines
from tests.faults.plan import Fault

FLIPPED = Fault("step", "flip_bit", rank=1, step=3, after=True)
TERM = Fault("step", "send", rank=0, step=4, with_={"name": "SIGTERM"})
RARELY = ("--checksum-every-n-steps", "100", "--save-every-n-steps", "100")


def _bad(step: int, until: int | None = None) -> Fault:
    return Fault("step", "spoil_image", rank=1, step=step, until=until, with_={"value": float("nan")})


def test_a_signal_does_not_save_replicas_that_differ(lab: Lab) -> None:
    ended = lab.run("r", *RARELY, plan=[FLIPPED, TERM])
    assert ended.codes == [95, 95], ended.text[-3000:]
    assert lab.steps("r") == []
    assert len(events(lab.run_directory("r"), "replicas differ")) == 1


def test_replicas_that_differ_stop_the_run_if_there_is_nothing_to_go_back_to(lab: Lab) -> None:
    more = ("--checksum-every-n-steps", "5", "--save-every-n-steps", "100", "--on-divergence", "rewind")
    ended = lab.run("r", *more, plan=[FLIPPED])
    assert ended.codes == [95, 95]
    assert "the ranks differ, and cannot be taken back" in ended.text
    assert lab.steps("r") == []


def test_a_bad_step_right_before_a_signal_is_an_event(lab: Lab) -> None:
    """The host knows of a step two steps later: a save must not come in between."""
    ended = lab.run("r", *RARELY, plan=[_bad(7), TERM])
    assert ended.codes == [0, 0]
    assert lab.steps("r") == [8]
    assert [event["step"] for event in events(lab.run_directory("r"), "skipped")] == [7]


def test_trouble_in_the_last_steps_keeps_the_checkpoints_before_it(lab: Lab) -> None:
    """Too many bad steps and no rewinds left: the run stops with 93, and what was saved is whole."""
    long = ("--train-num-samples", "240", "--save-every-n-steps", "5", "--guard-max-rewinds", "0")
    ended = lab.run("r", *long, plan=[_bad(18, until=30)])
    assert ended.codes == [93, 93], ended.text[-3000:]
    assert lab.steps("r")[-1] in (25, 30)
    assert not lab.leftovers("r")


def test_a_guard_that_is_turned_off_lowers_nothing_any_more(lab: Lab) -> None:
    """Three bad steps damp the run; without a guard nobody would ever undamp it."""
    constant = ("--skip-scheduler",)
    term = Fault("step", "send", step=7, with_={"name": "SIGTERM"})
    assert lab.run("r", *constant, plan=[_bad(2, until=5), term]).codes == [0, 0]
    assert events(lab.run_directory("r"), "damp")
    last = max(_rates(lab))
    assert _rates(lab)[last] == 0.5e-3
    lab.finish("r", *constant, "--guard", "off")
    assert _rates(lab)[last + 1] == 1e-3
    assert max(_rates(lab)) == STEPS - 1


def _rates(lab: Lab) -> dict[int, float]:
    lines = json_lines(lab.run_directory("r") / "metrics.jsonl")
    return {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}
