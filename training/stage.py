"""Trains a run through the phases of its curriculum: a stage for each, one after another in the same process.

    Phase -> Stage: model, data, evaluations, optimizer -> restored -> train() -> checkpoint of the phase's last step
                                                             ^                               |
                                                             +---------- next phase ---------+

A phase ends as a run that is stopped, and begins as one that is started again with other settings: all it knows is in
the checkpoint. So a run that is killed anywhere ends like one that is not. Without ``--phases`` there is one stage.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from models.factory import BuiltModel
from models.text_form import cut_texts
from training.assembly import (
    TrainedModel,
    build_device_loading,
    build_evaluations,
    build_loader,
    build_measurement,
    build_parts,
    build_plan,
    build_saver,
    build_schedule,
    build_supervisor,
    build_trained_model,
    evaluate_epoch,
    seed_all,
)
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.mirror import Mirror
from training.checkpoint.run_state import RunParts
from training.cli import config_values
from training.data.storage import StorageError
from training.data.trace import SampleTrace
from training.evaluation.evaluators import Evaluator
from training.garbage import CollectionInStep
from training.losses.build import build_loss
from training.observability.events import EventLog, read_events
from training.observability.reporter import Reporter
from training.observability.sinks import evaluated_epochs
from training.phase_check import first_plan
from training.phases import Phase, Phases
from training.plan import TrainPlan
from training.precision import Precision
from training.resilience.exit_codes import BAD_USAGE
from training.resilience.preemption import Preemption
from training.resilience.watchdog import Watchdog
from training.resuming import load, resume
from training.run import Origin, Run, Source
from training.state import TrainState
from training.supervisor import Supervisor, Tally
from training.train import Ending, train
from training.train_step import TrainStep
from training.work import Work

logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """What trains through one phase."""

    run: Run
    """With the phase's settings."""
    phase: Phase
    trained: TrainedModel
    reads: BuiltModel
    """The model as the data are prepared for it: captions may be cut shorter than it could read them."""
    evaluators: Sequence[Evaluator]
    plan: TrainPlan
    parts: RunParts
    lr: float
    """``--lr``, or the default of an optimizer that was given none."""
    beta2: float | None
    """None for optimizers without."""
    epoch_shown: int
    """Samples of an epoch in the log: as OpenCLIP counts them, also those that fill no batch."""


@dataclass(frozen=True)
class Lasting:
    """What stays from stage to stage."""

    run: Run
    """With the settings of the flags."""
    phases: Phases
    work: Work
    precision: Precision
    preemption: Preemption
    watchdog: Watchdog
    reporter: Reporter | None
    events: EventLog | None
    trace: SampleTrace | None
    mirror: Mirror | None


class Prepared(NamedTuple):
    """A stage that can begin. Whoever drops it gives back the memory of its model."""

    train: Callable[..., Ending]
    state: TrainState
    supervisor: Supervisor


def base_batch(run: Run) -> int:
    """The global batch of the flags: in its steps warm-up and schedule count, whatever those of the phases are."""
    return run.config.data.batch_size * run.runtime.world_size * run.config.engine.accum_freq


def build_stage(run: Run, phases: Phases, phase: Phase, *, precision: Precision, reads_weights: bool = True) -> Stage:
    """Everything that has to do with the model. Collective: all ranks.

    Args:
        run: with the settings of the flags.
        reads_weights: False if they come from a checkpoint of this run anyway.
    """
    base, runtime = run.config, run.runtime
    run, config = replace(run, config=phase.config), phase.config
    # As in OpenCLIP: one seed for the weights on all ranks, then one per rank for what each of them draws.
    seed_all(config.engine.seed)
    trained = build_trained_model(
        config, runtime=runtime, precision=precision, reads_weights=reads_weights, text_length=phase.text_length
    )
    built = trained.built
    seed_all(config.engine.seed + runtime.rank)
    evaluators = build_evaluations(run, built)
    reads = built._replace(config=cut_texts(built.config, phase.text_length))
    # An epoch is as long in all phases.
    loader = build_loader(run, reads, epoch_batch=base.data.batch_size)
    plan = build_plan(run, loader, epoch_batch=base.data.batch_size)
    resizes = phases.path is not None or _may_change_image_size(run)
    parts = build_parts(
        run,
        built,
        loader,
        precision=precision,
        phase={"number": phase.number, **phase.settings},
        resizes_positions=resizes,
    )
    optimizer = parts.optimizer
    return Stage(
        run=run,
        phase=phase,
        trained=trained,
        reads=reads,
        evaluators=evaluators,
        plan=plan,
        parts=parts,
        lr=float(optimizer.param_groups[0]["lr"]),
        beta2=optimizer.defaults["betas"][1] if "betas" in optimizer.defaults else None,
        epoch_shown=loader.num_samples,
    )


def _may_change_image_size(run: Run) -> bool:
    checkpoint = run.config.checkpoint
    named = {name.removeprefix("--").replace("-", "_") for name in checkpoint.allow_config_change}
    return checkpoint.branch_from is not None or "force_image_size" in named


def build_first_stage(run: Run, phases: Phases, source: Source, *, precision: Precision) -> tuple[Stage, Origin]:
    """The stage that this start begins or goes on with, restored. Collective: all ranks."""
    plan = first_plan(run, phases)
    phase = phases.at(source.samples_seen or (source.epoch * plan.samples_per_epoch if plan else 0))
    while True:
        stage = build_stage(run, phases, phase, precision=precision)
        origin = resume(run, stage.parts, source, plan=stage.plan, phases=phases)
        phase = phases.at(stage.parts.state.samples_seen)
        if phase is stage.phase:
            return _as_begun(run, stage), origin
        # The newest checkpoint is damaged, and the one before it of an earlier phase.
        del stage
        _free_memory(run)


def _as_begun(run: Run, stage: Stage) -> Stage:
    """With the epoch, and the step of the schedule, of the first start."""
    state = stage.parts.state
    state.schedule_batch = state.schedule_batch or base_batch(run)
    if state.samples_per_epoch in (0, stage.plan.samples_per_epoch):
        state.samples_per_epoch = stage.plan.samples_per_epoch
        return stage
    plan = replace(stage.plan, samples_per_epoch=state.samples_per_epoch)
    return stage._replace(plan=plan, epoch_shown=plan.samples_per_epoch)


def prepare(lasting: Lasting, stage: Stage) -> Prepared:
    """What is left to do of a stage: to run it. Collective: all ranks."""
    run, parts, plan = stage.run, stage.parts, stage.plan
    config, reporter = run.config, lasting.reporter
    saver = build_saver(run, parts, settings=settings_of(lasting.run, lasting.phases))
    supervisor = build_supervisor(
        run,
        parts,
        saver=saver,
        reporter=reporter,
        events=lasting.events,
        preemption=lasting.preemption,
        watchdog=lasting.watchdog,
        beta2=stage.beta2,
    )
    train_step = TrainStep(
        model=stage.trained.wrapped,
        loss=build_loss(config.loss),
        optimizer=parts.optimizer,
        scaler=parts.scaler,
        precision=lasting.precision,
        grad_clip_norm=config.optim.grad_clip_norm,
        num_sources=len(parts.loader.source.source_names),
        guard=parts.guard,
    )
    results = run.paths.results_jsonl if run.paths else None
    _announce(lasting, stage)
    return Prepared(
        partial(
            train,
            plan,
            until=stage.phase.end,
            parts=parts,
            train_step=train_step,
            schedule=build_schedule(config.schedule, lr=stage.lr, plan=plan, state=parts.state),
            load=build_device_loading(
                stage.reads, lasting.precision, device=run.runtime.device, text_packing=config.engine.text_packing
            ),
            trace=lasting.trace,
            measurement=build_measurement(
                run,
                parts,
                plan,
                lasting.work.during(stage.phase),
                train_step=train_step,
                supervisor=supervisor,
                reporter=reporter,
            ),
            evaluate=partial(evaluate_epoch, run, stage.trained.built, stage.evaluators, lasting.precision),
            evaluated=lambda: evaluated_epochs(results) if results else set(),
            saver=saver,
            supervisor=supervisor,
            reporter=reporter,
            runtime=run.runtime,
        ),
        parts.state,
        supervisor,
    )


def run_stages(lasting: Lasting, prepared: list[Prepared]) -> Ending:
    """Trains to the end of the run, or until a signal. Collective: all ranks, in step.

    Args:
        prepared: the first stage; taken out, so that nobody holds it when the next one needs its memory.
    """
    while True:
        stage = prepared.pop()
        with CollectionInStep(lasting.run.config.engine.gc_every_n_steps) as garbage:
            ending = stage.train(garbage=garbage)
        state, tally = stage.state, stage.supervisor.tally()
        del stage
        if ending is not Ending.PHASE:
            return ending
        prepared.append(_begin_next(lasting, state, tally))


def _begin_next(lasting: Lasting, state: TrainState, tally: Tally) -> Prepared:
    """The next stage; what keeps it from beginning is one line, and a code."""
    try:
        return _next_stage(lasting, state, tally)
    except (ValueError, DamagedCheckpoint, StorageError) as error:
        if lasting.run.config.logging.debug:
            raise
        logger.error("The next phase cannot begin: %s", error)
        # Storage may come back, and instead of a checkpoint that is damaged another start takes the one before.
        raise SystemExit(BAD_USAGE if isinstance(error, ValueError) else 1) from error


def settings_of(run: Run, phases: Phases) -> dict[str, Any]:
    """What a checkpoint remembers of the flags, by name: of ``--phases`` what the file says."""
    return config_values(run.config) | {"phases": phases.as_json()}


def _next_stage(lasting: Lasting, state: TrainState, tally: Tally) -> Prepared:
    run = lasting.run
    assert run.paths is not None  # without, --phases are refused
    lasting.watchdog.start_again()
    _free_memory(run)
    phase = lasting.phases.at(state.samples_seen)
    stage = build_stage(run, lasting.phases, phase, precision=lasting.precision, reads_weights=False)
    load(
        str(Checkpointer(run.paths.checkpoints).path(state.step)),
        run,
        stage.parts,
        plan=stage.plan,
        phases=lasting.phases,
    )
    if lasting.reporter is not None:
        lasting.reporter.restart_clock()
    prepared = prepare(lasting, _as_begun(run, stage))
    prepared.supervisor.go_on_from(tally)
    return prepared


def _free_memory(run: Run) -> None:
    """Models, their wrappers and their hooks hold each other: only a collection sets their memory free."""
    if run.config.engine.torchcompile:
        torch.compiler.reset()  # programs are counted by source line, and after a few there are no new ones
    gc.collect()
    if run.runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def _announce(lasting: Lasting, stage: Stage) -> None:
    """One line, and one event where the phase begins."""
    phase, state, config = stage.phase, stage.parts.state, stage.run.config
    if lasting.phases.path is None:
        return
    height, width = stage.reads.preprocess.size
    facts: dict[str, Any] = {
        "image_size": [height, width],
        "batch_size": config.data.batch_size,
        "text_length": stage.reads.config.text_cfg.context_length,
        "patch_dropout": stage.reads.config.vision_cfg.patch_dropout,
        "aug_cfg": dict(config.image.aug_cfg),
    }
    flops = lasting.work.during(phase).flops_per_sample
    cost = "" if flops is None else f", {flops / 1e9:.4g} GFLOPs a sample"
    logger.info(
        "Phase %d of %d: images %d x %d, batch %d, texts %d, patch dropout %g%s; from %s samples on, now %s.",
        *(phase.number, len(lasting.phases), height, width, facts["batch_size"], facts["text_length"]),
        *(facts["patch_dropout"], cost, f"{phase.begin:,}", f"{state.samples_seen:,}"),
    )
    if lasting.events is None or stage.run.paths is None:
        return
    known = [event for event in read_events(stage.run.paths.events_jsonl) if event.get("event") == "phase"]
    if not known or (known[-1].get("number"), known[-1].get("settings")) != (phase.number, dict(phase.settings)):
        facts |= {"gflops_per_sample": None if flops is None else flops / 1e9, "samples_seen": state.samples_seen}
        lasting.events.write(state.step, "phase", number=phase.number, settings=dict(phase.settings), **facts)
