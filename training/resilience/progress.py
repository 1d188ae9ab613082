"""Tells a job that crashes at the same step again and again from one that is merely interrupted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

MOST_STARTS = 3
"""Starts of a job in a row that may crash before they have saved anything new."""
COUNT_VARIABLE = "CLIPYARD_CRASHES"
"""How often the batch script has seen this job crash without progress. It knows a lost node, and a preemption that left
no time to save, from a crash; the history does not."""


def crashed_starts(
    starts: Sequence[Mapping[str, Any]],
    *,
    step: int,
    job: str | None,
    after_signal: bool,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """How many starts of a requeued job, right before this one, ended without progress and without a signal.

    A run that a person starts again by hand is not counted: they have changed something, or want to see it fail.

    Args:
        starts: earlier lines of the history, oldest first.
        step: the first that this start would take.
        job: of the scheduler; None without one.
        after_signal: whether the last start ended in order, because a signal asked it to.
    """
    counted = environment.get(COUNT_VARIABLE, "")
    if counted.isdecimal():
        return int(counted)
    count = 0
    for start in reversed(starts):
        if after_signal or job is None or start.get("job") != job or start["step"] != step:
            break
        count += 1
        after_signal = bool(start.get("after_signal"))
    return count
