"""The state of a run that changes with every step, beside the weights: how far it has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Counters of a run. ``step`` is the only clock: one step is one update of the weights."""

    step: int = 0
    samples_seen: int = 0
    """Samples of all ranks that went into updates."""
    schedule_batch: int = 0
    """Global batch at the first start: the steps of the schedule, ``--warmup`` among them, are steps of so many."""
