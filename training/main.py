"""Entry point of a training process: ``python -m training.main FLAGS``, one process per device.

    flags -> Config -> Runtime -> run directory -> model, data, evaluations -> resume -> train (or evaluate only)

Everything that can be wrong with a run's description is found before its first step, on every rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from training.assembly import (
    build_evaluations,
    build_model,
    choose_attention,
    evaluate_epoch,
    seed_all,
    set_device_defaults,
)
from training.checkpoint.epoch_loading import restore_weights
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.mirror import FINISH_TIMEOUT_S, SIGNAL_TIMEOUT_S
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
from training.observability.console import set_up_logging
from training.phase_check import agreed_phases, check_length
from training.precision import Precision, build_precision, cast_parameters
from training.resilience.exit_codes import BAD_USAGE, DO_NOT_REQUEUE
from training.resilience.heartbeat import Heartbeat, killed_ranks
from training.resilience.lease import LeaseLost
from training.resilience.preemption import Preemption
from training.resilience.watchdog import Watchdog
from training.run import (
    Run,
    agreed_resume_path,
    build_reporter,
    find_source,
    open_events,
    open_run,
    open_trace,
    record_settings,
    record_start,
    start_mirror,
)
from training.stage import (
    Lasting,
    Prepared,
    build_first_stage,
    prepare,
    run_stages,
)
from training.train import Ending

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
    set_device_defaults(run.runtime.device)
    precision = build_precision(run.config.engine.precision, run.runtime.device)
    if not has_train_data(run.config.data):
        return _build_evaluation_only(run, precision=precision, watchdog=watchdog)
    phases, work = agreed_phases(run)
    stage, origin = build_first_stage(run, phases, find_source(run), precision=precision)
    plan, loader, state = stage.plan, stage.parts.loader, stage.parts.state
    check_length(run, phases, plan)
    record_settings(run, stage.trained.built.model, plan, phases=phases)
    record_start(run, loader, first_step=state.step, origin=origin, phases=phases)
    reporter = build_reporter(run, loader_samples=stage.epoch_shown, first_step=state.step)
    lasting = Lasting(
        run=run,
        phases=phases,
        work=work,
        precision=precision,
        preemption=preemption,
        watchdog=watchdog,
        reporter=reporter,
        events=open_events(run, reporter, first_step=state.step),
        trace=open_trace(run, first_step=state.step),
        mirror=start_mirror(run),
    )
    return partial(_train_and_close, lasting, [prepare(lasting, stage)])


def _train_and_close(lasting: Lasting, prepared: list[Prepared]) -> None:
    run, ending = lasting.run, Ending.STOPPED
    try:
        ending = run_stages(lasting, prepared)
    except DataBudgetExceeded as error:
        logger.error("%s", error)
        raise
    finally:
        if lasting.reporter is not None:
            lasting.reporter.close()
        if lasting.mirror is not None and not isinstance(sys.exception(), LeaseLost):
            # A signal or a failure leaves seconds; the next start uploads the rest.
            with lasting.watchdog.phase("save"):
                lasting.mirror.finish(FINISH_TIMEOUT_S if ending is Ending.COMPLETED else SIGNAL_TIMEOUT_S)
    logger.info("%s %s%s.", ending.value, run.name, f": see {run.paths.root}" if run.paths else "")


def _build_evaluation_only(run: Run, *, precision: Precision, watchdog: Watchdog) -> Callable[[], None]:
    """Without training data the weights are evaluated once, as in OpenCLIP."""
    seed = run.config.engine.seed
    seed_all(seed)
    built = build_model(run.config)
    seed_all(seed + run.runtime.rank)
    evaluators = build_evaluations(run, built)
    epoch = 0
    if run.config.checkpoint.resume:
        path = agreed_resume_path(run)
        if path is not None:
            epoch = restore_weights(path, built.model, runtime=run.runtime)
    cast_parameters(built.model, precision)
    built.model.to(run.runtime.device)

    def run_once() -> None:
        with watchdog.phase("evaluation"):
            result = evaluate_epoch(run, built, evaluators, precision, epoch, last=True)
        reporter = build_reporter(run, loader_samples=0, first_step=epoch)
        if reporter is not None:
            reporter.evaluation(epoch, result, epoch=epoch)
            reporter.close()

    return run_once


if __name__ == "__main__":
    main()
