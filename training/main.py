"""Entry point of a training process: ``python -m training.main FLAGS``, one process per device.

    flags -> Config -> Runtime -> run directory -> model, data, evaluations -> resume -> train (or evaluate only)

Everything that can be wrong with a run's description is found before its first step, on every rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from models.factory import BuiltModel
from models.tokenizer import build_tokenizer
from training.assembly import (
    TrainedModel,
    build_device_loading,
    build_loader,
    build_measurement,
    build_model,
    build_parts,
    build_plan,
    build_saver,
    build_schedule,
    build_supervisor,
    build_trained_model,
    choose_attention,
    seed_all,
    set_device_defaults,
)
from training.checkpoint.config_change import ConfigChange, check_config_change, remarks
from training.checkpoint.epoch_loading import restore_weights
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.mirror import FINISH_TIMEOUT_S, SIGNAL_TIMEOUT_S, Mirror
from training.checkpoint.run_state import RunParts, names_a_run, restore
from training.cli import Parsed, parse_or_exit
from training.config import Config
from training.data.accounting import DataBudgetExceeded
from training.data.epoch import has_train_data
from training.data.storage import StorageError
from training.distributed.failure import fail_together
from training.distributed.flight_recorder import FlightRecorder
from training.distributed.hang_board import HangBoard
from training.distributed.job_end import JobEnd
from training.distributed.runtime import Runtime, close_runtime, collective_timeout, start_runtime
from training.evaluation.evaluate import build_evaluators, evaluate
from training.evaluation.evaluators import Evaluator
from training.garbage import CollectionInStep
from training.losses.build import build_loss
from training.observability.console import set_up_logging
from training.observability.reporter import Reporter
from training.observability.sinks import evaluated_epochs
from training.phases import read_phases
from training.plan import TrainPlan
from training.precision import Precision, build_precision, cast_parameters
from training.resilience.escalation import Escalation
from training.resilience.exit_codes import BAD_USAGE, DO_NOT_REQUEUE
from training.resilience.heartbeat import Heartbeat, killed_ranks
from training.resilience.lease import LeaseLost
from training.resilience.preemption import Preemption
from training.resilience.watchdog import Watchdog
from training.run import (
    Origin,
    Run,
    agreed_branch_point,
    agreed_resume_path,
    build_reporter,
    open_run,
    open_trace,
    record_settings,
    record_start,
    start_mirror,
)
from training.supervisor import Supervisor
from training.train import Ending, train
from training.train_step import TrainStep
from training.work import Work

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training process to its end; a failure on any rank ends all ranks with a non-zero code."""
    parsed = parse_or_exit(sys.argv[1:] if argv is None else argv)
    set_up_logging(path=None, debug=parsed.config.logging.debug, rank=0, on_screen=False)
    timeout = collective_timeout(parsed.config.resilience)
    runtime = _start_runtime(parsed.config, timeout)
    with fail_together(runtime) as job_end, ExitStack() as stack:
        watched = Watched(stack.enter_context(Preemption()), job_end, stack)
        start_training = _prepare(parsed, runtime, watched)
        try:
            start_training()
        except LeaseLost as error:
            logger.error("%s", error)
            raise SystemExit(DO_NOT_REQUEUE) from error
    close_runtime(runtime)


def _start_runtime(config: Config, timeout: timedelta) -> Runtime:
    """Meets the other ranks; what keeps them apart is one line."""
    try:
        return start_runtime(config.engine, collective_timeout=timeout)
    except (ValueError, RuntimeError) as error:
        if config.logging.debug:
            raise
        logger.error("%s", error)
        # Names, ports and missing ranks may be mended by another start.
        raise SystemExit(BAD_USAGE if isinstance(error, ValueError) else 1) from error


@dataclass(frozen=True)
class Watched:
    """What sees that this process is asked to end, and how all of them do."""

    preemption: Preemption
    job_end: JobEnd
    stack: ExitStack
    """What is entered here is closed when the run ends, however it does."""


def _prepare(parsed: Parsed, runtime: Runtime, watched: Watched) -> Callable[[], None]:
    """Builds the run; what the user can mend is one line and its code, without the traceback that hides it."""
    try:
        run = open_run(parsed, runtime)
        watchdog = _start_watching(run, watched)
        watched.stack.enter_context(choose_attention(run.config, runtime))
        return _build(run, watched.preemption, watchdog)
    except (ValueError, DamagedCheckpoint, StorageError) as error:
        if parsed.config.logging.debug:
            raise
        logger.error("%s", error)
        # A checkpoint does not heal by itself.
        raise SystemExit(DO_NOT_REQUEUE if isinstance(error, DamagedCheckpoint) else BAD_USAGE) from error


def _start_watching(run: Run, watched: Watched) -> Watchdog:
    """Hangs and silent deaths end the job from here on; the run directory is given back when it ends."""
    config, runtime = run.config.resilience, run.runtime
    hangs = run.paths.hangs if run.paths else None
    if run.lease is not None and runtime.is_main:
        watched.stack.callback(run.lease.release)
        watched.job_end.last_act = run.lease.release
    watched.job_end.known_deaths = partial(killed_ranks, hangs)
    watched.stack.enter_context(closing(Heartbeat(config.timeout_heartbeat, rank=runtime.rank, directory=hangs)))
    return watched.stack.enter_context(
        closing(
            Watchdog(
                config,
                rank=runtime.rank,
                world_size=runtime.world_size,
                directory=hangs,
                board=HangBoard(runtime),
                recorder=FlightRecorder(),
                end_job=watched.job_end.fail,
            )
        )
    )


def _build(run: Run, preemption: Preemption, watchdog: Watchdog) -> Callable[[], None]:
    """Model and evaluations, and with training data everything else; returns what is left to do: to run it."""
    config, runtime = run.config, run.runtime
    set_device_defaults(runtime.device)
    precision = build_precision(config.engine.precision, runtime.device)
    # As in OpenCLIP: one seed for the weights on all ranks, then one per rank for what each of them draws.
    seed_all(config.engine.seed)
    trained = None
    if has_train_data(config.data):
        trained = build_trained_model(config, runtime=runtime, precision=precision)
    built = build_model(config) if trained is None else trained.built
    seed_all(config.engine.seed + runtime.rank)
    evaluators = build_evaluators(
        config.evaluation,
        config.data,
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=config.model.cache_dir),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    if trained is None:
        return _build_evaluation_only(run, built, evaluators=evaluators, precision=precision, watchdog=watchdog)
    return _build_training(
        run, trained, evaluators=evaluators, precision=precision, preemption=preemption, watchdog=watchdog
    )


def _build_training(
    run: Run,
    trained: TrainedModel,
    *,
    evaluators: Sequence[Evaluator],
    precision: Precision,
    preemption: Preemption,
    watchdog: Watchdog,
) -> Callable[[], None]:
    config, built = run.config, trained.built
    loader = build_loader(run, built)
    plan = build_plan(run, loader, epoch_batch=config.data.batch_size)
    parts = build_parts(run, built, loader, precision=precision)
    optimizer = parts.optimizer
    base_lr = float(optimizer.param_groups[0]["lr"])  # --lr, or the default of an optimizer that was given none
    beta2 = optimizer.defaults["betas"][1] if "betas" in optimizer.defaults else None
    origin = _resume(run, parts, plan=plan)
    parts.state.schedule_batch = parts.state.schedule_batch or plan.samples_per_step
    record_settings(run, built.model, plan)
    record_start(run, loader, first_step=parts.state.step, origin=origin)
    reporter = build_reporter(run, loader_samples=loader.num_samples, first_step=parts.state.step)
    saver = build_saver(run, parts)
    mirror = start_mirror(run)
    supervisor = build_supervisor(
        run, parts, saver=saver, reporter=reporter, preemption=preemption, watchdog=watchdog, beta2=beta2
    )
    train_step = TrainStep(
        model=trained.wrapped,
        loss=build_loss(config.loss),
        optimizer=optimizer,
        scaler=parts.scaler,
        precision=precision,
        grad_clip_norm=config.optim.grad_clip_norm,
        num_sources=len(loader.source.source_names),
        guard=parts.guard,
    )
    return partial(
        _train_and_close,
        run,
        reporter,
        plan=plan,
        parts=parts,
        train_step=train_step,
        schedule=build_schedule(config.schedule, lr=base_lr, plan=plan, state=parts.state),
        load=build_device_loading(built, precision, device=run.runtime.device, text_packing=config.engine.text_packing),
        trace=open_trace(run, first_step=parts.state.step),
        measurement=build_measurement(
            run,
            parts,
            plan,
            Work(read_phases(config), None),
            train_step=train_step,
            supervisor=supervisor,
            reporter=reporter,
        ),
        evaluate=partial(_evaluate_epoch, run, built, evaluators, precision),
        saver=saver,
        supervisor=supervisor,
        mirror=mirror,
    )


def _train_and_close(
    run: Run, reporter: Reporter | None, *, supervisor: Supervisor, mirror: Mirror | None, **parts: Any
) -> None:
    results = run.paths.results_jsonl if run.paths else None
    ending = Ending.STOPPED
    try:
        with CollectionInStep(run.config.engine.gc_every_n_steps) as garbage:
            ending = train(
                reporter=reporter,
                supervisor=supervisor,
                evaluated=lambda: evaluated_epochs(results) if results else set(),
                garbage=garbage,
                runtime=run.runtime,
                **parts,
            )
    except DataBudgetExceeded as error:
        logger.error("%s", error)
        raise
    finally:
        if reporter is not None:
            reporter.close()
        if mirror is not None and not isinstance(sys.exception(), LeaseLost):
            # A signal or a failure leaves seconds; the next start uploads the rest.
            with supervisor.phase("save"):
                mirror.finish(FINISH_TIMEOUT_S if ending is Ending.COMPLETED else SIGNAL_TIMEOUT_S)
    logger.info("%s %s%s.", ending.value, run.name, f": see {run.paths.root}" if run.paths else "")


def _build_evaluation_only(
    run: Run, built: BuiltModel, *, evaluators: Sequence[Evaluator], precision: Precision, watchdog: Watchdog
) -> Callable[[], None]:
    """Without training data the weights are evaluated once, as in OpenCLIP."""
    epoch = 0
    if run.config.checkpoint.resume:
        path = agreed_resume_path(run)
        if path is not None:
            epoch = restore_weights(path, built.model, runtime=run.runtime)
    cast_parameters(built.model, precision)
    built.model.to(run.runtime.device)

    def run_once() -> None:
        with watchdog.phase("evaluation"):
            result = _evaluate_epoch(run, built, evaluators, precision, epoch, last=True)
        reporter = build_reporter(run, loader_samples=0, first_step=epoch)
        if reporter is not None:
            reporter.evaluation(epoch, result, epoch=epoch)
            reporter.close()

    return run_once


def _evaluate_epoch(
    run: Run,
    built: BuiltModel,
    evaluators: Sequence[Evaluator],
    precision: Precision,
    epoch: int,
    *,
    last: bool | None = None,
) -> Mapping[str, float]:
    """Metrics after ``epoch`` completed epochs; empty when nothing is due. Collective: all ranks."""
    if epoch == 0 and last is None and not run.config.evaluation.evaluate_at_start:
        return {}
    return evaluate(
        built.model,
        evaluators,
        epoch=epoch,
        last=epoch == run.config.schedule.epochs if last is None else last,
        preprocess=built.preprocess,
        device=run.runtime.device,
        autocast=precision.autocast,
        input_dtype=precision.input_dtype,
    )


def _resume(run: Run, parts: RunParts, *, plan: TrainPlan) -> Origin:
    """Restores what ``--resume`` or ``--branch-from`` names, if its settings allow that. Collective: all ranks."""
    branch = agreed_branch_point(run)
    if branch is None and run.config.checkpoint.resume is None:
        return Origin()
    path = agreed_resume_path(run, verified=False) if branch is None else str(branch.directory)
    if path is None:
        logger.info("Run %s has no checkpoint yet: starting from the beginning.", run.name)
        return Origin()
    change = ConfigChange()

    def judge(saved: Mapping[str, Any]) -> None:
        nonlocal change
        branches = branch is not None
        change = check_config_change(saved, run.config, world_size=run.runtime.world_size, branches=branches)
        parts.loader.accepts_new_stream = branches or change.allows_other_data
        for line in remarks(change, saved, run.config):
            logger.info("%s", line)

    loaded = restore(
        path,
        parts,
        runtime=run.runtime,
        steps_per_epoch=plan.steps_per_epoch,
        samples_per_step=plan.samples_per_step,
        fall_back=branch is None and names_a_run(str(run.config.checkpoint.resume)),
        judge=judge,
    )
    if change.unsettles and parts.guard is not None and parts.escalation is not None:
        parts.guard.settle()
        parts.escalation.settle()
    if parts.escalation is not None and (branch is not None or {"lr", "beta2"} & change.as_json().keys()):
        # Somebody has decided anew what the guard had lowered.
        parts.escalation.load_state_dict(Escalation(run.config.resilience).state_dict())
    return Origin(loaded, change.as_json(), None if branch is None else branch.as_json())


if __name__ == "__main__":
    main()
