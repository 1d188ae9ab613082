"""The training loop: batch, learning rate, step, log, supervise, save, evaluate.

batches on the device -> micro-batches of one step -> TrainStep -> StepMetrics -> Measurement
                                                                           \\-> Supervisor: go on, save, stop, rewind
                                                  \\-> at the end of an epoch: Saver, then evaluation
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.data.batch import Batch, BatchRecord, DeviceBatch
from training.data.trace import SampleTrace
from training.distributed.runtime import Runtime
from training.distributed.start_up import on_first_rank
from training.measurement import Measurement
from training.observability.reporter import Reporter
from training.plan import TrainPlan
from training.supervisor import Supervisor
from training.train_step import TrainStep


def train(
    plan: TrainPlan,
    *,
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
    runtime: Runtime,
) -> bool:
    """Trains from ``parts.state.step`` to the end of the plan. Collective: all ranks, in step.

    Args:
        load: brings the loader's batches to the device.
        trace: where the samples of every step are written down; None with no need to.
        evaluate: epoch -> metrics; empty when nothing is due. Called on all ranks.
        evaluated: epochs whose evaluation is already on record (asked once, on rank 0).
        saver: None when nothing is to be saved.
        reporter: only on rank 0, for evaluations.

    Returns:
        Whether the plan was completed; False if a signal stopped the run, which is saved then.
    """
    state = parts.state
    ahead = plan.steps_ahead(state)
    if supervisor.asked_to_stop():
        supervisor.end_by_signal(epoch=(state.step + ahead) // plan.steps_per_epoch)
        return False
    epoch, place_in_epoch = divmod(state.step + ahead, plan.steps_per_epoch)
    if saver is not None and place_in_epoch == 0:
        saver.export_owed(epoch)
    owed = _owed_evaluation(plan, state.step + ahead, evaluated=evaluated, runtime=runtime)
    if owed is not None:
        _evaluate(owed, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
    batches = load(iter(parts.loader))
    measurement.restart()
    while state.step + ahead < plan.total_steps:
        step, place = state.step, state.step + ahead  # batches consumed, and where in the schedule this one stands
        micro_batches, waited_s = _next_micro_batches(batches, plan.accum_freq)
        ends_epoch = (place + 1) % plan.steps_per_epoch == 0
        if supervisor.leaves_out(step):
            _consume(micro_batches, plan, parts=parts, trace=trace)
            decision = supervisor.after_left_out(step)
        else:
            measurement.begin_step(waited_s=waited_s)
            lr = schedule(place) * supervisor.lr_factor
            metrics = train_step(micro_batches, lr=lr)
            _consume(micro_batches, plan, parts=parts, trace=trace)
            measurement.end_step(step, place, metrics, micro_batches[-1], lr=lr)
            saves = ends_epoch or (saver is not None and saver.is_due(state.step))
            samples = [_record(batch).samples for batch in micro_batches]
            decision = supervisor.after_step(step, metrics.vitals, samples, saves=saves)

        epoch = (place + 1) // plan.steps_per_epoch  # completed ones
        if decision.rewind_from is not None:
            supervisor.rewind(decision, epoch=epoch)
            measurement.restart()
        if saver is not None:
            # Saved before it is evaluated: an evaluation can be repeated, the steps cannot.
            with supervisor.phase("save"):
                if ends_epoch:
                    saver.save_epoch(epoch)
                elif decision.save or saver.is_due(state.step):
                    saver.save_step(epoch=epoch)
        if decision.stop and place + 1 < plan.total_steps:
            supervisor.end_by_signal(epoch=epoch)
            return False
        if ends_epoch:
            _evaluate(epoch, state.step, evaluate=evaluate, saver=saver, supervisor=supervisor, reporter=reporter)
            measurement.restart()
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


def _next_micro_batches(batches: Iterator[DeviceBatch], count: int) -> tuple[list[DeviceBatch], float]:
    """The micro-batches of one step, and the seconds spent waiting for them."""
    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(count)]
    return micro_batches, time.perf_counter() - start


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
