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
    samples_per_epoch: int = 0
    """As the first start counted them: an epoch of the same data is as long on any number of ranks. 0: not known."""
    last_batch: int = 0
    """Global batch of the last step, which may have reached into the next epoch; 0: not known."""
