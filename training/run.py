"""A run as such: its name, its directory, its log, what it reports and what it writes down about itself."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from models.clip import Clip
from training.checkpoint.branch import BranchPoint, find_branch_point, has_own_checkpoint
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.export import read_epoch_file
from training.checkpoint.manifest import DamagedCheckpoint, read_train
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_run import bring_back, fetch_resume, is_remote_run, open_mirror
from training.checkpoint.run_state import find_resume_path
from training.cli import Parsed, config_values, to_yaml
from training.config import Config
from training.data.loader import TrainLoader
from training.data.trace import SampleTrace, truncate_other_ranks
from training.distributed.runtime import Runtime
from training.distributed.start_up import on_first_rank
from training.losses.build import describe_loss
from training.naming import RunPaths, choose_run_name, claim_run_directory, params_text, run_paths
from training.observability.console import ProgressLine, set_up_logging
from training.observability.events import EventLog
from training.observability.history import append_start, describe_start, read_starts
from training.observability.reporter import Reporter
from training.observability.sinks import JsonLinesSink, MetricSink, TensorBoardSink, WandbSink
from training.phases import Phases
from training.plan import TrainPlan
from training.resilience.exit_codes import DO_NOT_REQUEUE
from training.resilience.lease import Lease, claim_lease
from training.resilience.progress import MOST_STARTS, crashed_starts
from training.resilience.sentinel import remove_sentinels
from training.validation import report_targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What every part of a run is told: its settings, its place among the ranks, where it writes."""

    config: Config
    runtime: Runtime
    name: str
    paths: RunPaths | None
    """None with ``--logs none``."""
    progress: ProgressLine
    lease: Lease | None
    """The claim of this start on the run directory; None with ``--logs none``."""
    after_signal: bool
    """Whether the start before this one ended in order because it was asked to; known on rank 0."""


def open_run(parsed: Parsed, runtime: Runtime) -> Run:
    """Names the run, claims its directory and starts the log. Collective: all ranks.

    Raises:
        ValueError: the name is taken, another job owns the run, or nothing can be written there; on every rank.
    """
    config = parsed.config
    name = on_first_rank(lambda: choose_run_name(config, date=datetime.now()), rank=runtime.rank)
    paths = run_paths(config, name=name, rank=runtime.rank)
    lease, claim = None, Claim()
    if paths is not None:
        claim = on_first_rank(lambda: _claim(paths, config), rank=runtime.rank)
        lease = Lease(paths.leases, claim.generation)
    writes_log = runtime.is_local_main if config.logging.log_local else runtime.is_main
    progress = set_up_logging(
        path=paths.out_log if paths and writes_log else None,
        debug=config.logging.debug,
        rank=runtime.rank,
        on_screen=runtime.is_main,
    )
    if runtime.is_main:
        for notice in parsed.notices:
            logger.warning("%s", notice)
        for notice in claim.notices:
            logger.info("%s", notice)
    logger.info("Run %s: rank %d of %d on %s.", name, runtime.rank, runtime.world_size, runtime.device)
    return Run(config, runtime, name, paths, progress, lease, claim.after_signal)


class Claim(NamedTuple):
    """What rank 0 found when it took the run directory."""

    generation: int = 0
    after_signal: bool = False
    notices: Sequence[str] = ()
    """For the log, once it is open."""


def _claim(paths: RunPaths, config: Config) -> Claim:
    """Makes the run directory this start's own, and fetches what only the mirror has. On rank 0."""
    claim_run_directory(paths, config=config)
    lease = claim_lease(paths.leases, take_over=config.resilience.take_over)
    try:
        # First of all: what a killed save has left may fill the disk, and holds what an exchange had put aside.
        Checkpointer(paths.checkpoints, generation=lease.generation).clean_up()
        after_signal = remove_sentinels(paths.root)
        notices = bring_back(config.checkpoint, run=paths.root, name=paths.root.name, generation=lease.generation)
    except BaseException:
        lease.release()  # this start ends here, and owns nothing any more
        raise
    return Claim(lease.generation, after_signal, notices)


@dataclass(frozen=True)
class Origin:
    """What a start goes on from: nothing, a checkpoint of its own run, or one of its parent's."""

    resumed_from: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """{setting: [in the checkpoint, now]}."""
    parent: Mapping[str, Any] | None = None


class Source(NamedTuple):
    """What a start takes its weights and its place in the run from."""

    path: str | None = None
    """None: it begins."""
    branch: BranchPoint | None = None
    samples_seen: int = 0
    """As far as can be seen before it is read and verified."""
    epoch: int = 0
    """The same of a file that tells nothing else, where the phase depends on it."""


def find_source(run: Run) -> Source:
    """What ``--resume`` or ``--branch-from`` stands for. Collective: all ranks.

    Raises:
        ValueError: no such checkpoint. DamagedCheckpoint: there are checkpoints, and none is whole.
    """
    branch = agreed_branch_point(run)
    if branch is None and run.config.checkpoint.resume is None:
        return Source()
    path = agreed_resume_path(run, verified=False) if branch is None else str(branch.directory)
    if path is None:
        logger.info("Run %s has no checkpoint yet: starting from the beginning.", run.name)
        return Source()
    if path.endswith(".pt"):
        has_phases = run.config.schedule.phases is not None
        # collective: all ranks
        epoch = on_first_rank(lambda: read_epoch_file(path).epoch if has_phases else 0, rank=run.runtime.rank)
        return Source(path, branch, epoch=epoch)
    samples_seen = on_first_rank(lambda: _samples_seen(Path(path)), rank=run.runtime.rank)  # collective: all ranks
    return Source(path, branch, samples_seen)


def _samples_seen(path: Path) -> int:
    """0 of a checkpoint that cannot be read: whoever loads it says so."""
    try:
        return int(read_train(path)["samples_seen"])
    except (DamagedCheckpoint, KeyError):
        return 0


def agreed_branch_point(run: Run) -> BranchPoint | None:
    """What ``--branch-from`` names, until the run has a checkpoint of its own. Collective: all ranks.

    Raises:
        ValueError: no such checkpoint; on every rank.
    """
    spec, logs = run.config.checkpoint.branch_from, Path(run.config.logging.logs)
    if spec is None:
        return None
    checkpoints = run.paths.checkpoints if run.paths else None
    return on_first_rank(
        lambda: None if has_own_checkpoint(checkpoints) else find_branch_point(spec, logs=logs), rank=run.runtime.rank
    )


def agreed_resume_path(run: Run, *, verified: bool = True) -> str | None:
    """What ``--resume`` stands for; None if nothing is saved yet. Collective: all ranks.

    Rank 0 looks and all ranks take what it found: they may see a busy file system differently.

    Args:
        verified: not needed for a path that ``restore`` verifies while it reads.

    Raises:
        ValueError: no such checkpoint. DamagedCheckpoint: there are checkpoints, and none is whole.
    """
    resume, zero = run.config.checkpoint.resume, run.config.checkpoint.allow_restart_from_zero
    assert resume is not None
    checkpoints = run.paths.checkpoints if run.paths else None
    if is_remote_run(resume):
        return on_first_rank(
            lambda: fetch_resume(run.config.checkpoint, checkpoints=checkpoints), rank=run.runtime.rank
        )
    return on_first_rank(
        lambda: find_resume_path(resume, checkpoints=checkpoints, verified=verified, allow_restart_from_zero=zero),
        rank=run.runtime.rank,
    )


def build_reporter(run: Run, *, loader_samples: int, first_step: int) -> Reporter | None:
    """The sinks that ``--report-to`` names, and the log; on rank 0 only."""
    if not run.runtime.is_main:
        return None
    config, paths = run.config, run.paths
    sinks: list[MetricSink] = []
    metrics: list[MetricSink] = []
    details: list[MetricSink] = []
    if paths is not None:
        targets = report_targets(config.logging.report_to)
        metrics.append(JsonLinesSink(paths.metrics_jsonl, first_step=first_step))
        details.append(JsonLinesSink(paths.telemetry_jsonl, first_step=first_step))
        if "tensorboard" in targets:
            sinks.append(TensorBoardSink(paths.tensorboard, first_step=first_step))
        if "wandb" in targets:
            settings = config_values(config)
            sinks.append(WandbSink(paths.root, config=config.logging, name=run.name, settings=settings))
    return Reporter(
        sinks=[*metrics, *sinks],
        detail_sinks=[*details, *sinks],
        progress=run.progress,
        results_path=paths.results_jsonl if paths else None,
        samples_per_epoch=loader_samples,
    )


def record_settings(run: Run, model: Clip, plan: TrainPlan, *, phases: Phases) -> None:
    """Writes params.txt and config.yaml, and says in the log what is about to happen. On rank 0.

    Args:
        run: with the settings of the flags; what phases change is in what they say.
    """
    if not run.runtime.is_main:
        return
    config, runtime = run.config, run.runtime
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("Model %s: %.1f M parameters, %.1f M trained.", config.model.model, parameters / 1e6, trained / 1e6)
    logger.info(
        "%d epochs of %d steps; global batch %d = %d per rank x %d ranks x %d micro-steps; precision %s.",
        plan.epochs,
        plan.steps_per_epoch,
        plan.samples_per_step,
        plan.samples_per_step // (runtime.world_size * plan.accum_freq),
        runtime.world_size,
        plan.accum_freq,
        config.engine.precision,
    )
    for line in describe_loss(config.loss, world_size=runtime.world_size):
        logger.info("%s", line)
    if run.paths is None:
        return
    facts = {
        "device": str(runtime.device),
        "rank": runtime.rank,
        "local_rank": runtime.local_rank,
        "world_size": runtime.world_size,
        "name": run.name,
        "phases": phases.as_json(),
    }
    run.paths.params_txt.write_text(params_text(config, paths=run.paths, facts=facts))
    run.paths.config_yaml.write_text(to_yaml(replace(config, logging=replace(config.logging, name=run.name))))
    if config.logging.copy_codebase:
        _copy_code(run.paths.code)


def record_start(run: Run, loader: TrainLoader, *, first_step: int, origin: Origin, phases: Phases) -> None:
    """Says in the log how the data are dealt, and adds this start, with what it depends on, to the run's history."""
    deal, lanes = loader.deal, len(loader.lanes)
    logger.info(
        "Data: %d samples an epoch in %d slots; %d lanes, %d of them on this rank, shuffled in blocks of %d.",
        *(loader.num_samples, loader.source.slots_per_epoch, deal.num_lanes, lanes, deal.block),
    )
    if loader.num_workers > lanes:
        logger.warning(
            "%d of %d workers have no lane: lower --workers, or raise --data-lanes.",
            *(loader.num_workers - lanes, loader.num_workers),
        )
    if run.runtime.is_main and run.paths is not None:
        _check_progress(run, run.paths.starts_jsonl, first_step=first_step)
        facts = {
            "world_size": run.runtime.world_size,
            "batch_size": loader.batch_size,
            "accum_freq": run.config.engine.accum_freq,
            "data_lanes": deal.num_lanes,
            "shuffle_block": deal.block,
            "data_epoch": round(loader.epoch_of_lanes()[1], 4),
            "after_signal": run.after_signal,
            "new_data": loader.new_stream._asdict() if loader.new_stream else None,
            "phases": phases.as_json(),
        }
        append_start(run.paths.starts_jsonl, describe_start(step=first_step, facts=facts, **vars(origin)))


def _check_progress(run: Run, history: Path, *, first_step: int) -> None:
    """Ends a job that the scheduler starts again and again, and that crashes every time before it has saved anything.

    Raises:
        SystemExit: with the code that says do not requeue.
    """
    job = os.environ.get("SLURM_JOB_ID")
    crashed = crashed_starts(read_starts(history), step=first_step, job=job, after_signal=run.after_signal)
    if crashed >= MOST_STARTS:
        logger.error(
            "Job %s has crashed %d times in a row without getting past a checkpoint after step %d: look at the end of "
            "%s for why. Submit it anew to try again.",
            *(job, crashed, first_step, run.paths.out_log if run.paths else "the log"),
        )
        raise SystemExit(DO_NOT_REQUEUE)


def open_events(run: Run, reporter: Reporter | None, *, first_step: int) -> EventLog | None:
    """Where rank 0 writes down everything unusual."""
    if reporter is None or run.paths is None:
        return None
    return EventLog(run.paths.events_jsonl, first_step, sinks=reporter.detail_sinks)


def start_mirror(run: Run) -> Mirror | None:
    """Begins to mirror the run (``--remote-sync``); on rank 0, None elsewhere. Collective: all ranks.

    Raises:
        ValueError: the URL cannot be used, holds another run, or does not work; on every rank.
    """
    paths, lease = run.paths, run.lease
    if paths is None or run.config.checkpoint.remote_sync is None:
        return None
    opened: list[Mirror | None] = []

    def check() -> None:
        fence = lease.check if lease is not None else None
        opened.append(open_mirror(run.config.checkpoint, run=paths.root, name=run.name, fence=fence))

    on_first_rank(check, rank=run.runtime.rank)
    mirror = opened[0] if opened else None
    if mirror is not None:
        mirror.start()
    return mirror


def open_trace(run: Run, *, first_step: int) -> SampleTrace | None:
    """Where this rank writes down its samples, with ``--trace-samples``."""
    if not run.config.data.trace_samples or run.paths is None:
        return None
    if run.runtime.is_main:
        truncate_other_ranks(run.paths.trace, world_size=run.runtime.world_size, first_step=first_step)
    return SampleTrace(run.paths.trace, rank=run.runtime.rank, first_step=first_step)


def _copy_code(destination: Path) -> None:
    """The packages of this program as they run now."""
    here = Path(__file__).resolve().parent.parent
    for package in ("training", "models", "slurm", "configs"):
        shutil.copytree(
            here / package, destination / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
