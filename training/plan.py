"""The arithmetic of a run: epochs, steps and samples. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from training.state import TrainState


@dataclass(frozen=True)
class TrainPlan:
    """Everything counts in steps, and one step is one update of the weights."""

    steps_per_epoch: int
    epochs: int
    accum_freq: int
    """Micro-batches per step and rank."""
    samples_per_step: int
    """Samples of all ranks and micro-batches: the global batch."""
    log_every_n_steps: int
    log_metric_every_n_steps: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def logs_line(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is printed: every n steps of an epoch, and its last."""
        place = step % self.steps_per_epoch
        return place % self.log_every_n_steps == 0 or place == self.steps_per_epoch - 1

    def steps_ahead(self, state: TrainState) -> int:
        """How far the place in the schedule is ahead of the steps taken; 0 unless the global batch has changed.

        Schedule and epochs follow the samples seen: on other ranks a run goes on with the learning rate it had.
        """
        return round(state.samples_seen / self.samples_per_step) - state.step

    def logs_metrics(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is measured, which costs a device synchronisation and a small all-reduce."""
        return self.logs_line(step) or step % self.steps_per_epoch % self.log_metric_every_n_steps == 0
