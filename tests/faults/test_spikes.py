"""Rows 32 and 33: a loss that stays high, and second moments that are too small."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.lab import Lab, Record, events, json_lines
from tests.faults.plan import Fault

LONG = (
    *("--train-num-samples", "640", "--save-every-n-steps", "10", "--keep-checkpoints", "5"),
    *("--guard-warmup", "10", "--guard-skip-steps", "30", "--lr", "1e-4"),
)
STEPS, ONSET = 80, 30
SPIKE = Fault("step", "scale_loss", step=ONSET, until=ONSET + 25, with_={"factor": 20.0})
"""On both ranks: 25 batches that should not be met again."""


def test_a_loss_that_stays_high_is_rewound_and_its_data_left_out(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 32."""
    lab.finish("r", *LONG, plan=[SPIKE])
    run = lab.run_directory("r")
    (rewind,) = events(run, "rewind")
    (rewound,) = events(run, "rewound")
    assert ONSET <= rewind["step"] < ONSET + 25
    assert rewind["onset"] == ONSET
    assert rewound["to_step"] <= ONSET
    record = lab.record("r")
    assert record.samples == undisturbed(*LONG).samples  # the clock of the data goes on: nothing comes twice
    assert set(record.losses) & set(range(ONSET + 30, STEPS)) == set(range(ONSET + 30, STEPS))
    assert max(loss for step, loss in record.losses.items() if step >= ONSET + 30) < 3.0


def test_without_the_guard_a_loss_that_stays_high_is_learned_from(lab: Lab) -> None:
    """Negative control of row 32."""
    lab.finish("r", *LONG, "--guard", "off", plan=[SPIKE])
    assert not events(lab.run_directory("r"), "rewind")
    assert not events(lab.run_directory("r"), "skipped")


TELEMETRY = (*LONG, "--telemetry-every-n-steps", "1")
SMALL_MOMENTS = Fault("step", "scale_second_moment", step=ONSET, with_={"factor": 1e-6})


def _growth_of_updates(lab: Lab) -> float:
    """How many times as large the largest update relative to its weights is, right after the fault."""
    largest: dict[int, float] = {}
    for line in json_lines(lab.run_directory("r") / "telemetry.jsonl"):
        if ratios := [value for name, value in line.items() if name.startswith("telemetry/update_ratio/")]:
            largest[line["step"]] = max(ratios)
    after = max(value for step, value in largest.items() if ONSET <= step < ONSET + 5)
    growth = after / max(value for step, value in largest.items() if ONSET - 5 <= step < ONSET)
    print(f"updates grew {growth:.1f} times")
    return growth


def test_second_moments_that_are_too_small_damp_the_run_before_the_loss_rises(lab: Lab) -> None:
    """Row 33."""
    lab.finish("r", *TELEMETRY, plan=[SMALL_MOMENTS])
    damp = events(lab.run_directory("r"), "damp")[0]
    assert ONSET <= damp["step"] <= ONSET + 8
    assert "update RMS" in damp["reason"]
    assert all(event["step"] > damp["step"] for event in events(lab.run_directory("r"), "skipped"))


def test_stableadamw_keeps_updates_small_whatever_the_second_moments_are(lab: Lab) -> None:
    """Row 33."""
    lab.finish("r", *TELEMETRY, "--opt", "stableadamw", plan=[SMALL_MOMENTS])
    assert _growth_of_updates(lab) < 7


def test_adamw_makes_the_large_updates(lab: Lab) -> None:
    """Negative control of row 33: nothing is damped, nothing is clipped."""
    lab.finish("r", *TELEMETRY, "--guard", "off", plan=[SMALL_MOMENTS])
    assert _growth_of_updates(lab) > 12


def test_without_telemetry_nobody_sees_the_updates_grow(lab: Lab) -> None:
    """Negative control of row 33."""
    lab.finish("r", *LONG, "--telemetry-every-n-steps", "0", plan=[SMALL_MOMENTS])
    damps = [event for event in events(lab.run_directory("r"), "damp") if "update RMS" in event["reason"]]
    assert not damps
