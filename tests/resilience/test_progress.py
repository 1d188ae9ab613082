"""Crash loops are told from interruptions by the history alone."""

from __future__ import annotations

import pytest

from training.resilience.progress import COUNT_VARIABLE, crashed_starts


def start(step, job="7", after_signal=False):
    return {"step": step, "job": job, "after_signal": after_signal}


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([], 0),
        ([start(5), start(5), start(5)], 3),
        ([start(0), start(5), start(5)], 2),
        ([start(5), start(5, job="6"), start(5)], 1),
        # The second line began after a signal: what came before it had ended in order.
        ([start(5), start(5, after_signal=True), start(5)], 2),
    ],
)
def test_starts_count_until_one_made_progress_or_ended_in_order(starts, expected):
    assert crashed_starts(starts, step=5, job="7", after_signal=False) == expected


def test_a_start_after_a_signal_begins_the_count_anew():
    assert crashed_starts([start(5)] * 3, step=5, job="7", after_signal=True) == 0


def test_a_run_started_by_hand_may_crash_as_often_as_one_likes():
    assert crashed_starts([start(5, job=None)] * 9, step=5, job=None, after_signal=False) == 0


def test_where_the_batch_script_counts_the_history_does_not():
    counted = {COUNT_VARIABLE: "1"}
    assert crashed_starts([start(5)] * 9, step=5, job="7", after_signal=False, environment=counted) == 1
