"""Measures a run between its steps: losses, times, data, slow ranks at log points, telemetry now and then.

Everything that waits for the device stands here; between log points nothing does.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from training.checkpoint.run_state import RunParts
from training.data.batch import DeviceBatch
from training.data.meter import DataMeter
from training.distributed.collectives import all_reduce_sum, gather_objects
from training.distributed.runtime import Runtime
from training.observability.compute_clock import ComputeClock
from training.observability.metrics import StepClock, TokenCount
from training.observability.reporter import Reporter, Standing
from training.observability.stragglers import RankTimes, StragglerReport
from training.observability.telemetry import Telemetry
from training.plan import TrainPlan
from training.supervisor import Supervisor
from training.train_step import StepMetrics
from training.work import Work


class Measurement:
    """What is measured of the steps since the last log point. All ranks call every method, in step."""

    def __init__(
        self,
        plan: TrainPlan,
        work: Work,
        *,
        parts: RunParts,
        compute_clock: ComputeClock,
        meter: DataMeter,
        telemetry: Telemetry,
        supervisor: Supervisor,
        reporter: Reporter | None,
        runtime: Runtime,
    ) -> None:
        """
        Args:
            compute_clock: the step's own.
            reporter: only on rank 0.
        """
        self._plan = plan
        self._work = work
        self._parts = parts
        self._compute_clock = compute_clock
        self._meter = meter
        self._telemetry = telemetry
        self._supervisor = supervisor
        self._reporter = reporter
        self._runtime = runtime
        self._stragglers = StragglerReport(gather_objects(socket.gethostname()))  # collective: all ranks
        self._clock = StepClock()
        self._tokens = TokenCount()

    def begin_step(self, *, waited_s: float) -> None:
        """The batch of a step is there, after a wait."""
        self._clock.add_step(data_wait_s=waited_s)
        self._compute_clock.start()

    def end_step(self, step: int, seen: int, metrics: StepMetrics, batch: DeviceBatch, *, lr: float) -> None:
        """Measures what is due after a step. Collective: all ranks.

        Args:
            seen: samples before the step.
            batch: the step's last, for telemetry and to count its tokens.

        Raises:
            DataBudgetExceeded: too much of the data is bad; on all ranks.
        """
        self._tokens.add(batch.texts)
        if self._plan.logs_metrics(seen):
            numbers = self._measure(step, seen, metrics) | {"lr": lr}
            if self._reporter is not None:
                standing, line = self._standing(seen), self._plan.logs_line(seen)
                self._reporter.step(step, numbers, standing=standing, log_line=line)
            self.restart()
        if self._telemetry.is_due(step):
            skipped = self._supervisor.skipped(metrics.vitals)
            measured = self._telemetry.measure(batch, skipped=skipped)  # host sync
            self._supervisor.note_telemetry(step, measured)
            if self._reporter is not None:
                self._reporter.scalars(step, measured)

    def restart(self) -> None:
        """What has passed since the last log point is not the steps' own time, and is left out."""
        self._clock.reset()
        self._tokens = TokenCount()

    def _standing(self, seen: int) -> Standing:
        plan = self._plan
        epoch, after = plan.epoch_at(seen), seen + plan.samples_per_step
        samples = after - epoch * plan.samples_per_epoch
        done = after // plan.samples_per_step
        return Standing(
            epoch=epoch,
            samples=samples,
            epoch_share=min(1.0, samples / plan.samples_per_epoch),
            begins_epoch=plan.place_in_epoch(seen) == 0,
            steps_done=done,
            total_steps=done + plan.steps_left(after),
            left=self._work.left(after, total=plan.total_samples) / plan.samples_per_step,
        )

    def _measure(self, step: int, seen: int, metrics: StepMetrics) -> dict[str, float]:
        plan, clock, world_size = self._plan, self._clock, self._runtime.world_size
        numbers = _read_metrics(metrics, world_size=world_size)  # host sync; collective: all ranks
        numbers |= clock.read(samples_per_step=plan.samples_per_step, world_size=world_size)
        numbers |= self._tokens.read()
        numbers |= {"epoch": seen / plan.samples_per_epoch, "samples_seen": self._parts.state.samples_seen}
        numbers |= self._work.read(self._parts.state.samples_seen)
        computed = self._compute_clock.read()  # host sync
        numbers |= self._meter.measure(
            wait_s=clock.data_wait_s,
            elapsed_s=clock.elapsed_s,
            device=self._runtime.device,
            compute_s=computed.seconds,
        )  # collective: all ranks
        numbers |= _read_source_losses(metrics, names=self._parts.loader.source.source_names)
        times = _times_of_ranks(self._meter, steps=computed.steps)
        numbers |= self._stragglers.metrics(times)
        if (straggler := self._stragglers.observe(times, step_s=numbers["batch_time"])) is not None:
            self._supervisor.note_straggler(step, straggler)
        return numbers


def _read_metrics(metrics: StepMetrics, *, world_size: int) -> dict[str, float]:
    """Means over ranks of what a step computed, in Python numbers. Collective: all ranks."""
    names = [name for name, value in metrics._asdict().items() if value is not None and value.ndim == 0]
    values = torch.stack([getattr(metrics, name).detach().float() for name in names])
    means: Sequence[float] = (all_reduce_sum(values) / world_size).tolist()  # host sync
    numbers = dict(zip(names, means, strict=True))
    # OpenCLIP logs the temperature as "scale" (3.3.0) or "logit_scale" (later), the loss under both its names.
    return numbers | {"scale": numbers["logit_scale"], "contrastive_loss": numbers["loss"]}


def _times_of_ranks(meter: DataMeter, *, steps: int) -> RankTimes:
    """What the meter has just gathered, per step."""
    return RankTimes(*([seconds / steps for seconds in meter.of_ranks(name)] for name in ("compute_s", "wait_s")))


def _read_source_losses(metrics: StepMetrics, *, names: Sequence[str]) -> dict[str, float]:
    """The loss by source of data, where there are several. Collective: all ranks."""
    if metrics.source_losses is None:
        return {}
    sums = all_reduce_sum(metrics.source_losses.float()).tolist()  # host sync
    return {f"data/source_loss/{name}": total / rows for name, (total, rows) in zip(names, sums, strict=True) if rows}
