"""The training loop: batch, learning rate, step, log, supervise, save, evaluate.

batches on the device -> micro-batches of one step -> TrainStep -> StepMetrics -> Measurement
                                                                           \\-> Supervisor: go on, save, stop, rewind
                                                  \\-> at the end of an epoch: Saver, then evaluation
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum

from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.data.batch import Batch, BatchRecord, DeviceBatch
from training.data.trace import SampleTrace
from training.distributed.runtime import Runtime
from training.distributed.start_up import on_first_rank
from training.garbage import CollectionInStep
from training.measurement import Measurement
from training.observability.reporter import Reporter
from training.plan import TrainPlan
from training.state import TrainState
from training.supervisor import Supervisor
from training.train_step import TrainStep


class Ending(Enum):
    """Why training ended."""

    COMPLETED = "Finished"
    STOPPED = "Stopped"
    """By a signal; the run is saved."""
    PHASE = "Phase over"
    """The run goes on in its next phase, from the checkpoint of the last step."""


def train(
    plan: TrainPlan,
    *,
    until: int | None = None,
    parts: RunParts,
    train_step: TrainStep,
    schedule: Callable[[int], float],
    load: Callable[[Iterator[Batch]], Iterator[DeviceBatch]],
    trace: SampleTrace | None,
    measurement: Measurement,
    evaluate: Callable[[int], Mapping[str, float]],
    evaluated: Callable[[], set[int]],
    saver: Saver | None,
    supervisor: Supervisor,
    reporter: Reporter | None,
    garbage: CollectionInStep,
    runtime: Runtime,
) -> Ending:
    """Trains from ``parts.state`` to the end of the plan, or of the phase. Collective: all ranks, in step.

    Args:
        until: samples seen at which the phase ends; None for the last one.
        schedule: samples seen -> learning rate of the next step.
        load: brings the loader's batches to the device.
        trace: where the samples of every step are written down; None with no need to.
        evaluate: epoch -> metrics; empty when nothing is due. Called on all ranks.
        evaluated: epochs whose evaluation is already on record (asked once, on rank 0).
        saver: None when nothing is to be saved.
        reporter: only on rank 0, for evaluations.
        garbage: entered.

    Raises:
        RuntimeError: the end of the phase could not be saved.
    """
    state = parts.state
    end = plan.total_samples if until is None else min(until, plan.total_samples)
    epoch = plan.epoch_at(state.samples_seen)
    if supervisor.asked_to_stop():
        supervisor.end_by_signal(epoch=epoch)
        return Ending.STOPPED
    if saver is not None and plan.begins_epoch(state.samples_seen, last_batch=state.last_batch):
        saver.export_owed(epoch)
    owed = _owed_evaluation(plan, state, evaluated=evaluated, runtime=runtime)
    if owed is not None:
        with garbage.automatic():
            _evaluate(owed, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
    batches = load(iter(parts.loader))
    measurement.restart()
    while state.samples_seen < end:
        step, seen = state.step, state.samples_seen  # before this step
        micro_batches, waited_s = _next_micro_batches(batches, plan.accum_freq)
        ends_epoch = plan.ends_epoch(seen)
        is_last = seen + plan.samples_per_step >= end
        if supervisor.leaves_out(step):
            _consume(micro_batches, plan, parts=parts, trace=trace)
            decision = supervisor.after_left_out(step)
        else:
            measurement.begin_step(waited_s=waited_s)
            lr = schedule(seen) * supervisor.lr_factor
            metrics = train_step(micro_batches, lr=lr)
            _consume(micro_batches, plan, parts=parts, trace=trace)
            measurement.end_step(step, seen, metrics, micro_batches[-1], lr=lr)
            saves = ends_epoch or is_last or (saver is not None and saver.is_due(state.step))
            samples = [_record(batch).samples for batch in micro_batches]
            decision = supervisor.after_step(step, metrics.vitals, samples, saves=saves)

        garbage.after_step(state.step)
        epoch = plan.epoch_at(state.samples_seen)  # completed ones
        if decision.rewind_from is not None:
            with garbage.automatic():
                supervisor.rewind(decision, epoch=epoch)
            measurement.restart()
        if saver is not None:
            # Saved before it is evaluated: an evaluation can be repeated, the steps cannot.
            with supervisor.phase("save"):
                if ends_epoch:
                    saver.save_epoch(epoch)
                elif decision.save or saver.is_due(state.step):
                    saver.save_step(epoch=epoch)
        if decision.stop and state.samples_seen < plan.total_samples:
            supervisor.end_by_signal(epoch=epoch)
            return Ending.STOPPED
        if ends_epoch:
            with garbage.automatic():
                _evaluate(epoch, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
            measurement.restart()
    if state.samples_seen < plan.total_samples:
        supervisor.end_phase(epoch=epoch)
        return Ending.PHASE
    supervisor.end()
    return Ending.COMPLETED


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
    parts.state.last_batch = plan.samples_per_step


def _record(batch: DeviceBatch) -> BatchRecord:
    assert batch.record is not None
    return batch.record


def _next_micro_batches(batches: Iterator[DeviceBatch], count: int) -> tuple[list[DeviceBatch], float]:
    """The micro-batches of one step, and the seconds spent waiting for them."""
    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(count)]
    return micro_batches, time.perf_counter() - start


def _owed_evaluation(
    plan: TrainPlan, state: TrainState, *, evaluated: Callable[[], set[int]], runtime: Runtime
) -> int | None:
    """The epoch that a run saved and did not come to evaluate. Collective: all ranks."""
    known = on_first_rank(evaluated, rank=runtime.rank)  # collective: all ranks
    epoch = plan.epoch_at(state.samples_seen)
    is_owed = plan.begins_epoch(state.samples_seen, last_batch=state.last_batch) and epoch not in known
    return epoch if is_owed else None


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
