"""The arithmetic of a run: epochs, steps and samples. Pure.

Everything follows from the samples seen, so that a run whose global batch changes, in another phase or on other ranks,
stays where it is: an epoch ends with the first step at or past its samples, and so does the run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainPlan:
    """How long a run is, and where in it a step stands that is taken after so many ``seen`` samples."""

    samples_per_epoch: int
    epochs: int
    accum_freq: int
    """Micro-batches per step and rank."""
    samples_per_step: int
    """Samples of all ranks and micro-batches: the global batch."""
    log_every_n_steps: int
    log_metric_every_n_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Of the present global batch; the last may reach into the next epoch."""
        return -(-self.samples_per_epoch // self.samples_per_step)

    @property
    def total_samples(self) -> int:
        """Of the whole run."""
        return self.samples_per_epoch * self.epochs

    def steps_left(self, seen: int) -> int:
        """Steps to the end of the run, if the global batch stays as it is."""
        return max(0, -(-(self.total_samples - seen) // self.samples_per_step))

    def epoch_at(self, seen: int) -> int:
        """Completed epochs."""
        return seen // self.samples_per_epoch

    def place_in_epoch(self, seen: int) -> int:
        """Steps of the present size since the epoch began."""
        return seen % self.samples_per_epoch // self.samples_per_step

    def begins_epoch(self, seen: int, *, last_batch: int) -> bool:
        """Whether the step before, of so many samples, was the last of its epoch; 0: of as many as the next one."""
        return self.epoch_at(seen) > self.epoch_at(seen - (last_batch or self.samples_per_step))

    def ends_epoch(self, seen: int) -> bool:
        """Whether the step is the last of its epoch."""
        return self.epoch_at(seen + self.samples_per_step) > self.epoch_at(seen)

    def logs_line(self, seen: int) -> bool:
        """Whether the step is printed: every n steps of an epoch, and its last."""
        return self.place_in_epoch(seen) % self.log_every_n_steps == 0 or self.ends_epoch(seen)

    def logs_metrics(self, seen: int) -> bool:
        """Whether the step is measured, which costs a device synchronisation and a small all-reduce."""
        return self.logs_line(seen) or self.place_in_epoch(seen) % self.log_metric_every_n_steps == 0
