"""The training loop: batch, learning rate, step, log, supervise, save, evaluate.

batches on the device -> micro-batches of one step -> TrainStep -> StepMetrics -> Reporter
                                                                           \\-> Supervisor: go on, save, stop, rewind
                                             \\-> at the end of an epoch: Saver, then evaluation
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.data.batch import Batch, BatchRecord, DeviceBatch
from training.data.meter import DataMeter
from training.data.trace import SampleTrace
from training.distributed.collectives import all_reduce_sum, gather_objects
from training.distributed.runtime import Runtime
from training.distributed.start_up import on_first_rank
from training.observability.metrics import StepClock
from training.observability.reporter import Reporter
from training.observability.stragglers import RankTimes, StragglerReport
from training.observability.telemetry import Telemetry
from training.state import TrainState
from training.supervisor import Supervisor
from training.train_step import StepMetrics, TrainStep


@dataclass(frozen=True)
class TrainPlan:
    """The arithmetic of a run: everything counts in steps, and one step is one update of the weights."""

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

    def end_of_epoch(self, place: int) -> int:
        """Where in the schedule the epoch of ``place`` ends."""
        return (place // self.steps_per_epoch + 1) * self.steps_per_epoch

    def steps_ahead(self, state: TrainState) -> int:
        """How far the place in the schedule is ahead of the steps taken; 0 unless the global batch has changed.

        Schedule and epochs follow the samples seen: on other ranks a run goes on with the learning rate it had.
        """
        return round(state.samples_seen / self.samples_per_step) - state.step

    def logs_metrics(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is measured, which costs a device synchronisation and a small all-reduce."""
        return self.logs_line(step) or step % self.steps_per_epoch % self.log_metric_every_n_steps == 0


def train(
    plan: TrainPlan,
    *,
    parts: RunParts,
    train_step: TrainStep,
    schedule: Callable[[int], float],
    load: Callable[[Iterator[Batch]], Iterator[DeviceBatch]],
    meter: DataMeter,
    trace: SampleTrace | None,
    telemetry: Telemetry | None,
    evaluate: Callable[[int], Mapping[str, float]],
    evaluated: Callable[[], set[int]],
    saver: Saver | None,
    supervisor: Supervisor,
    reporter: Reporter | None,
    runtime: Runtime,
) -> bool:
    """Trains from ``parts.state.step`` to the end of the plan. Collective: all ranks, in step.

    Args:
        load: brings the loader's batches to the device.
        trace: where the samples of every step are written down; None with no need to.
        telemetry: what is measured now and then, layer by layer; None for nothing.
        evaluate: epoch -> metrics; empty when nothing is due. Called on all ranks.
        evaluated: epochs whose evaluation is already on record (asked once, on rank 0).
        saver: None when nothing is to be saved.
        reporter: only on rank 0.

    Returns:
        Whether the plan was completed; False if a signal stopped the run, which is saved then.
    """
    state = parts.state
    ahead = plan.steps_ahead(state)
    if supervisor.asked_to_stop():
        supervisor.end_by_signal(epoch=(state.step + ahead) // plan.steps_per_epoch)
        return False
    owed = _owed_evaluation(plan, state.step + ahead, evaluated=evaluated, runtime=runtime)
    if owed is not None:
        _evaluate(owed, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
    stragglers = StragglerReport(gather_objects(socket.gethostname()))  # collective: all ranks
    batches = load(iter(parts.loader))
    clock = StepClock()
    while state.step + ahead < plan.total_steps:
        step, place = state.step, state.step + ahead  # batches consumed, and where in the schedule this one stands
        micro_batches, waited_s = _next_micro_batches(batches, plan.accum_freq)
        train_step.compute_clock.start()
        lr = schedule(place) * supervisor.lr_factor
        metrics = train_step(micro_batches, lr=lr)
        _consume(micro_batches, plan, parts=parts, trace=trace)
        clock.add_step(data_wait_s=waited_s)

        if plan.logs_metrics(place):
            numbers = _read_metrics(metrics, world_size=runtime.world_size)  # host sync; collective: all ranks
            numbers |= clock.read(samples_per_step=plan.samples_per_step, world_size=runtime.world_size)
            numbers |= {"lr": lr, "epoch": place / plan.steps_per_epoch, "samples_seen": state.samples_seen}
            computed = train_step.compute_clock.read()  # host sync
            numbers |= _read_data(metrics, clock, computed.seconds, parts=parts, meter=meter, device=runtime.device)
            times = _times_of_ranks(meter, steps=computed.steps)
            numbers |= stragglers.metrics(times)
            if (straggler := stragglers.observe(times, step_s=numbers["batch_time"])) is not None:
                supervisor.note_straggler(step, straggler)
            if reporter is not None:
                log_line = plan.logs_line(place)
                reporter.step(step, numbers, place=place, samples_per_step=plan.samples_per_step, log_line=log_line)
            clock.reset()
        if telemetry is not None and telemetry.is_due(step):
            measured = telemetry.measure(micro_batches[-1], skipped=supervisor.skipped(metrics.vitals))  # host sync
            supervisor.note_telemetry(step, measured)
            if reporter is not None:
                reporter.scalars(step, measured)

        epoch, place_in_epoch = divmod(state.step + ahead, plan.steps_per_epoch)
        due = saver is not None and (place_in_epoch == 0 or saver.is_due(state.step))
        samples = [_record(batch).samples for batch in micro_batches]
        decision = supervisor.after_step(step, metrics.vitals, samples, saves=due)
        if decision.rewind_from is not None and supervisor.rewind(decision.rewind_from, settle=decision.settle):
            until = min(decision.resume_step, plan.end_of_epoch(place) - ahead)
            _leave_out(batches, plan, until=until, parts=parts, supervisor=supervisor, trace=trace)
            epoch, place_in_epoch = divmod(state.step + ahead, plan.steps_per_epoch)
            supervisor.save_rewound(epoch=epoch)
        if saver is not None:
            # Saved before it is evaluated: an evaluation can be repeated, the steps cannot.
            with supervisor.phase("save"):
                if place_in_epoch == 0:
                    saver.save_epoch(epoch)
                elif decision.save or saver.is_due(state.step):
                    saver.save_step(epoch=epoch)
        if decision.stop and state.step + ahead < plan.total_steps:
            supervisor.end_by_signal(epoch=epoch)
            return False
        if place_in_epoch == 0:
            _evaluate(epoch, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
            clock.reset()
    supervisor.end()
    return True


def _consume(
    micro_batches: Sequence[DeviceBatch], plan: TrainPlan, *, parts: RunParts, trace: SampleTrace | None
) -> None:
    """The batches have become part of the run: a checkpoint from here on continues after them."""
    for batch in micro_batches:
        record = _record(batch)
        parts.loader.commit(record)
        if trace is not None:
            trace.append(parts.state.step, record.samples)
    parts.state.step += 1
    parts.state.samples_seen += plan.samples_per_step


def _record(batch: DeviceBatch) -> BatchRecord:
    assert batch.record is not None
    return batch.record


def _leave_out(
    batches: Iterator[DeviceBatch],
    plan: TrainPlan,
    *,
    until: int,
    parts: RunParts,
    supervisor: Supervisor,
    trace: SampleTrace | None,
) -> None:
    """Reads batches and does nothing with them: after a rewind, what may have caused the spike is not met again.

    The clock goes on: the schedule, the epochs and the trace count these samples as seen.
    """
    while parts.state.step < until:
        micro_batches, _ = _next_micro_batches(batches, plan.accum_freq)
        _consume(micro_batches, plan, parts=parts, trace=trace)
        supervisor.beat(parts.state.step)


def _next_micro_batches(batches: Iterator[DeviceBatch], count: int) -> tuple[list[DeviceBatch], float]:
    """The micro-batches of one step, and the seconds spent waiting for them."""
    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(count)]
    return micro_batches, time.perf_counter() - start


def _read_metrics(metrics: StepMetrics, *, world_size: int) -> dict[str, float]:
    """Means over ranks of what a step computed, in Python numbers. Collective: all ranks."""
    names = [name for name, value in metrics._asdict().items() if value is not None and value.ndim == 0]
    values = torch.stack([getattr(metrics, name).detach().float() for name in names])
    means: Sequence[float] = (all_reduce_sum(values) / world_size).tolist()  # host sync
    numbers = dict(zip(names, means, strict=True))
    # OpenCLIP logs the temperature as "scale" (3.3.0) or "logit_scale" (later), the loss under both its names.
    return numbers | {"scale": numbers["logit_scale"], "contrastive_loss": numbers["loss"]}


def _read_data(
    metrics: StepMetrics,
    clock: StepClock,
    compute_s: float,
    *,
    parts: RunParts,
    meter: DataMeter,
    device: torch.device,
) -> dict[str, float]:
    """What was read, and the loss by source. Collective: all ranks.

    Raises:
        DataBudgetExceeded: too much of the data is bad; on all ranks.
    """
    measured = meter.measure(wait_s=clock.data_wait_s, elapsed_s=clock.elapsed_s, device=device, compute_s=compute_s)
    return measured | _read_source_losses(metrics, names=parts.loader.source.source_names)


def _times_of_ranks(meter: DataMeter, *, steps: int) -> RankTimes:
    """What the meter has just gathered, per step."""
    return RankTimes(*([seconds / steps for seconds in meter.of_ranks(name)] for name in ("compute_s", "wait_s")))


def _read_source_losses(metrics: StepMetrics, *, names: Sequence[str]) -> dict[str, float]:
    """The loss by source of data, where there are several. Collective: all ranks."""
    if metrics.source_losses is None:
        return {}
    sums = all_reduce_sum(metrics.source_losses.float()).tolist()  # host sync
    return {f"data/source_loss/{name}": total / rows for name, (total, rows) in zip(names, sums, strict=True) if rows}


def _owed_evaluation(plan: TrainPlan, place: int, *, evaluated: Callable[[], set[int]], runtime: Runtime) -> int | None:
    """The epoch that a run saved and did not come to evaluate. Collective: all ranks."""
    epoch, place_in_epoch = divmod(place, plan.steps_per_epoch)
    known = on_first_rank(evaluated, rank=runtime.rank)  # collective: all ranks
    return epoch if place_in_epoch == 0 and epoch not in known else None


def _evaluate(
    epoch: int,
    step: int,
    *,
    evaluate: Callable[[int], Mapping[str, float]],
    saver: Saver | None,
    supervisor: Supervisor,
    reporter: Reporter | None,
) -> None:
    with supervisor.phase("evaluation"):
        result = evaluate(epoch)  # collective: all ranks
    if not result:
        return
    if reporter is not None:
        reporter.evaluation(step, result, epoch=epoch)
    if saver is not None:
        saver.report_metrics(step, result)
