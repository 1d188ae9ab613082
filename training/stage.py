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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from models.factory import BuiltModel
from models.profile import training_flops
from models.text_form import cut_texts
from training.assembly import (
    TrainedModel,
    build_device_loading,
    build_evaluations,
    build_loader,
    build_measurement,
    build_model,
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
from training.checkpoint.config_change import ConfigChange, check_config_change, remarks
from training.checkpoint.epoch_loading import whole_shapes
from training.checkpoint.mirror import Mirror
from training.checkpoint.positions import find_resizing
from training.checkpoint.run_state import RunParts, names_a_run, restore
from training.cli import config_values
from training.data.trace import SampleTrace
from training.distributed.start_up import on_first_rank
from training.evaluation.evaluators import Evaluator
from training.garbage import CollectionInStep
from training.losses.build import build_loss
from training.observability.events import EventLog, read_events
from training.observability.reporter import Reporter
from training.observability.sinks import evaluated_epochs
from training.phases import Phase, Phases, read_phases
from training.plan import TrainPlan
from training.precision import Precision
from training.resilience.escalation import Escalation
from training.resilience.preemption import Preemption
from training.resilience.watchdog import Watchdog
from training.run import Origin, Run, Source
from training.state import TrainState
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


def agreed_phases(run: Run) -> tuple[Phases, Work]:
    """The phases of a run, and what they cost. Collective: all ranks.

    Raises:
        ValueError: the file does not describe phases, or one that the model cannot go through; on all ranks.
    """

    def read() -> tuple[Phases, Sequence[int] | None]:
        phases = read_phases(run.config)
        return phases, None if phases.path is None else check_models(phases)

    phases, flops = on_first_rank(read, rank=run.runtime.rank)
    return phases, Work(phases, flops, phases.all[0])


def check_models(phases: Phases) -> Sequence[int] | None:
    """Builds the model of every phase without memory, and counts the FLOPs of a sample; None for towers that cannot.

    Raises:
        ValueError: a phase that the model cannot go through, or not after the phases before.
    """
    counts: list[int | None] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for phase in phases.all:
        try:
            built = build_model(phase.config, skeleton=True)
            counts.append(_check_model(phase, built, shapes))
        # What a tower of others thinks of an image size, it says in its forward pass.
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"--phases {phases.path}, phase {phase.number}: {error}") from error
        shapes = whole_shapes(built.model)
    counted = [count for count in counts if count is not None]
    return counted if len(counted) == len(counts) else None


def _check_model(phase: Phase, built: BuiltModel, before: Mapping[str, tuple[int, ...]]) -> int | None:
    cut_texts(built.config, phase.text_length)
    drops = any(type(module).__name__.startswith("PatchDropout") for module in built.model.visual.modules())
    if phase.settings.get("patch_dropout") and not drops:
        raise ValueError(
            f"patch_dropout {phase.settings['patch_dropout']}: the image tower of '{built.config.name}' has no patches "
            "to drop; leave it out"
        )
    shapes = whole_shapes(built.model)
    resizing = find_resizing(built.model, shapes, before) if before else None
    resized = None if resizing is None else resizing.table.name
    other = [name for name in shapes if before and before.get(name) != shapes[name] and name != resized]
    if other:
        raise ValueError(
            f"at this image size {other[0]} has the shape {shapes[other[0]]} and before {before.get(other[0])}, and "
            "only position embeddings of square grids are resized: keep the image size, or choose another model"
        )
    if built.config.text_cfg.hf_model_name is not None:
        return None
    image = {id(parameter) for parameter in built.model.visual.parameters()}
    trained = [parameter for parameter in built.model.parameters() if parameter.requires_grad and parameter.ndim > 0]
    return training_flops(
        built.config,
        text_length=phase.text_length,
        trains_image=any(id(parameter) in image for parameter in trained),
        trains_text=any(id(parameter) not in image for parameter in trained),
    )


def check_length(run: Run, phases: Phases, plan: TrainPlan) -> None:
    """Says what is odd about phases, now that the length of the run is known.

    Raises:
        ValueError: a step that is more than an epoch.
    """
    ranks = run.runtime.world_size * plan.accum_freq
    for remark in phases.check(samples_per_epoch=plan.samples_per_epoch, epochs=plan.epochs, ranks=ranks):
        logger.warning("%s", remark)


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
    )


def _may_change_image_size(run: Run) -> bool:
    checkpoint = run.config.checkpoint
    named = {name.removeprefix("--").replace("-", "_") for name in checkpoint.allow_config_change}
    return checkpoint.branch_from is not None or "force_image_size" in named


def build_first_stage(run: Run, phases: Phases, source: Source, *, precision: Precision) -> tuple[Stage, Origin]:
    """The stage that this start begins or goes on with, restored. Collective: all ranks."""
    phase = phases.at(source.samples_seen)
    while True:
        stage = build_stage(run, phases, phase, precision=precision)
        origin = _resume(run, stage, source, phases=phases)
        phase = phases.at(stage.parts.state.samples_seen)
        if phase is stage.phase:
            return stage, origin
        # The newest checkpoint is damaged, and the one before it of an earlier phase.
        del stage
        _free_memory(run)


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
        state = stage.state
        del stage
        if ending is not Ending.PHASE:
            return ending
        prepared.append(_next_stage(lasting, state))


def settings_of(run: Run, phases: Phases) -> dict[str, Any]:
    """What a checkpoint remembers of the flags, by name: of ``--phases`` what the file says."""
    return config_values(run.config) | {"phases": phases.as_json()}


def _next_stage(lasting: Lasting, state: TrainState) -> Prepared:
    run = lasting.run
    assert run.paths is not None  # without, --phases are refused
    lasting.watchdog.start_again()
    _free_memory(run)
    phase = lasting.phases.at(state.samples_seen)
    stage = build_stage(run, lasting.phases, phase, precision=lasting.precision, reads_weights=False)
    restore(
        str(Checkpointer(run.paths.checkpoints).path(state.step)),
        stage.parts,
        runtime=run.runtime,
        steps_per_epoch=stage.plan.steps_per_epoch,
        samples_per_step=stage.plan.samples_per_step,
    )
    if lasting.reporter is not None:
        lasting.reporter.restart_clock()
    return prepare(lasting, stage)


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


def _resume(run: Run, stage: Stage, source: Source, *, phases: Phases) -> Origin:
    """Restores what ``--resume`` or ``--branch-from`` names, if its settings allow that. Collective: all ranks.

    Args:
        run: with the settings of the flags.
    """
    parts, plan, branch = stage.parts, stage.plan, source.branch
    if source.path is None:
        return Origin()
    change = ConfigChange()

    def judge(saved: Mapping[str, Any]) -> None:
        nonlocal change
        branches = branch is not None
        change = check_config_change(
            saved, run.config, world_size=run.runtime.world_size, phases=phases.as_json(), branches=branches
        )
        parts.loader.accepts_new_stream = branches or change.allows_other_data
        for line in remarks(change, saved, run.config):
            logger.info("%s", line)

    loaded = restore(
        source.path,
        parts,
        runtime=run.runtime,
        steps_per_epoch=plan.steps_per_epoch,
        samples_per_step=plan.samples_per_step,
        fall_back=branch is None and names_a_run(str(run.config.checkpoint.resume)),
        judge=judge,
    )
    if loaded.endswith(".pt"):
        parts.state.samples_seen = parts.state.step // plan.steps_per_epoch * plan.samples_per_epoch
    if change.unsettles and parts.guard is not None and parts.escalation is not None:
        parts.guard.settle()
        parts.escalation.settle()
    if parts.escalation is not None and (branch is not None or {"lr", "beta2"} & change.as_json().keys()):
        # Somebody has decided anew what the guard had lowered.
        parts.escalation.load_state_dict(Escalation(run.config.resilience).state_dict())
    return Origin(loaded, change.as_json(), None if branch is None else branch.as_json())
