"""Builds single parts of a run from its configuration; ``main`` puts them together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from models.factory import BuiltModel, create_model
from models.locking import lock_image_tower, lock_text_tower
from models.text_form import build_packer, cut_texts
from models.tokenizer import build_tokenizer
from training.attention_kernel import AttentionCall, attention_calls, attention_kernel
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.config import Config, ModelConfig, ScheduleConfig
from training.data.accounting import FEWEST_SLOTS, BadSampleBudget
from training.data.batch import Batch, DeviceBatch, to_device
from training.data.build import build_train_loader
from training.data.device_decode import check_decoder
from training.data.loader import TrainLoader
from training.data.meter import DataMeter
from training.data.prefetch import load_to_device, pin
from training.distributed.collectives import all_reduce_sum, gather_objects
from training.distributed.compilation import compiler_problem
from training.distributed.memory_format import image_memory_format
from training.distributed.mesh import is_sharded
from training.distributed.parallelize import parallelize, tower_blocks
from training.distributed.runtime import Runtime, collective_timeout
from training.distributed.start_up import on_first_rank
from training.evaluation.evaluate import build_evaluators, evaluate
from training.evaluation.evaluators import Evaluator
from training.fp8 import use_fp8
from training.measurement import Measurement
from training.observability.events import EventLog
from training.observability.reporter import Reporter
from training.observability.telemetry import Telemetry
from training.optim.optimizer import build_optimizer
from training.optim.schedule import build_schedule as build_lr_schedule
from training.optim.stable_adamw import StableAdamW
from training.phases import Phase, read_phases
from training.plan import TrainPlan
from training.precision import Precision, build_precision, cast_parameters
from training.resilience.escalation import Escalation
from training.resilience.guard import StepGuard
from training.resilience.preemption import Preemption
from training.resilience.watchdog import Watchdog
from training.run import Run
from training.state import TrainState
from training.supervisor import Supervisor, Watch
from training.train_step import TrainStep
from training.work import Work


class TrainedModel(NamedTuple):
    """A model with its configuration, and what wraps it (with FSDP nothing does)."""

    built: BuiltModel
    wrapped: nn.Module


def build_trained_model(
    config: Config,
    *,
    runtime: Runtime,
    precision: Precision,
    reads_weights: bool = True,
    text_length: int | None = None,
) -> TrainedModel:
    """The model as it trains, on its device. Collective: all ranks.

    A seed means the same weights with and without FSDP. With it only rank 0 has them in memory, until the others have
    got their shards.

    Args:
        reads_weights: False for a model that gets them from elsewhere.
        text_length: tokens that captions are cut at; None: the context length.
    """
    is_split = is_sharded(config.engine, world_size=runtime.world_size)
    whole = build_model(config, reads_weights=reads_weights) if runtime.is_main or not is_split else None
    built = build_model(config, skeleton=True) if whole is None or is_split else whole
    for model in {built.model, built.model if whole is None else whole.model}:
        cast_parameters(model, precision)
    if config.engine.fp8 != "off":
        use_fp8(
            tower_blocks(built.model),
            config.engine.fp8,
            device=runtime.device,
            batch_size=config.data.batch_size,
            text_length=text_length or built.config.text_cfg.context_length,
            will_be_compiled=config.engine.torchcompile and compiler_problem(runtime.device.type) is None,
        )
    wrapped = parallelize(
        built.model if is_split else built.model.to(runtime.device),
        config=config.engine,
        runtime=runtime,
        param_dtype=precision.autocast_dtype,
        source=whole.model if is_split and whole is not None else None,
        timeout=collective_timeout(config.resilience),
    )
    return TrainedModel(built, wrapped)


def build_model(config: Config, *, skeleton: bool = False, reads_weights: bool = True) -> BuiltModel:
    """The model on the CPU, with weights loaded and towers locked as the flags say.

    Args:
        skeleton: build it on ``meta``: without memory, and without weights.
    """
    model, image = config.model, config.image
    # Source of the values: SigLIP (Zhai et al. 2023), section 3.2.
    siglip: dict[str, Any] = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    built = create_model(
        model.model,
        pretrained=model.pretrained,
        pretrained_image=model.pretrained_image,
        device="meta" if skeleton else "cpu",
        reads_weights=reads_weights and not skeleton,
        cache_dir=model.cache_dir,
        force_quick_gelu=model.force_quick_gelu,
        force_custom_text=model.force_custom_text,
        force_patch_dropout=model.force_patch_dropout,
        force_image_size=model.force_image_size,
        force_context_length=model.force_context_length,
        image_mean=image.image_mean,
        image_std=image.image_std,
        image_interpolation=image.image_interpolation,
        image_resize_mode=image.image_resize_mode,
        **(siglip if config.loss.siglip else {}),
    )
    _lock_towers(built, model)
    return built


def _lock_towers(built: BuiltModel, config: ModelConfig) -> None:
    if config.lock_image:
        lock_image_tower(
            built.model,
            unlocked_groups=config.lock_image_unlocked_groups,
            freeze_bn_stats=config.lock_image_freeze_bn_stats,
        )
    if config.lock_text:
        lock_text_tower(
            built.model,
            unlocked_layers=config.lock_text_unlocked_layers,
            freeze_layer_norm=config.lock_text_freeze_layer_norm,
        )


def build_evaluations(run: Run, built: BuiltModel) -> list[Evaluator]:
    """What the flags ask to be evaluated. Collective: all ranks."""
    config, runtime = run.config, run.runtime
    return build_evaluators(
        config.evaluation,
        config.data,
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=config.model.cache_dir),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )


def evaluate_epoch(
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


def build_loader(run: Run, built: BuiltModel, *, epoch_batch: int | None = None) -> TrainLoader:
    """The loader of the training data; its first sample has been looked at.

    Args:
        epoch_batch: samples per rank and micro-step that an epoch is divided into; None: those of the settings.
    """
    config, runtime = run.config, run.runtime
    if config.data.decode == "gpu":
        check_decoder(runtime.device)
    loader = build_train_loader(
        config.data,
        config.image,
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=config.model.cache_dir),
        rank=runtime.rank,
        world_size=runtime.world_size,
        accum_freq=config.engine.accum_freq,
        seed=config.engine.seed,
        epoch_batch=epoch_batch,
        pin=pin if runtime.device.type == "cuda" else None,
    )
    loader.check_first_sample()
    return loader


def build_plan(run: Run, loader: TrainLoader, *, epoch_batch: int) -> TrainPlan:
    """How many steps of how many samples; ``epoch_batch`` as for the loader."""
    config = run.config
    ranks = run.runtime.world_size * config.engine.accum_freq
    return TrainPlan(
        samples_per_epoch=loader.num_batches // config.engine.accum_freq * epoch_batch * ranks,
        epochs=config.schedule.epochs,
        accum_freq=config.engine.accum_freq,
        samples_per_step=config.data.batch_size * ranks,
        log_every_n_steps=config.logging.log_every_n_steps,
        log_metric_every_n_steps=config.logging.log_metric_every_n_steps,
    )


def build_parts(
    run: Run,
    built: BuiltModel,
    loader: TrainLoader,
    *,
    precision: Precision,
    phase: Mapping[str, Any],
    resizes_positions: bool,
) -> RunParts:
    """What a checkpoint holds."""
    config, runtime = run.config, run.runtime
    optimizer = build_optimizer(built.model, config.optim)
    guard = StepGuard(
        config.resilience,
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        all_reduce_sum=all_reduce_sum,
    )
    escalation = Escalation(config.resilience, clips_updates=isinstance(optimizer, StableAdamW))
    return RunParts(
        built.model,
        optimizer,
        precision.grad_scaler(),
        loader,
        TrainState(),
        guard=guard,
        escalation=escalation,
        phase=phase,
        resizes_positions=resizes_positions,
    )


def build_supervisor(
    run: Run,
    parts: RunParts,
    *,
    saver: Saver | None,
    reporter: Reporter | None,
    events: EventLog | None,
    preemption: Preemption,
    watchdog: Watchdog,
    beta2: float | None,
) -> Supervisor:
    """What decides between steps."""
    assert parts.guard is not None
    assert parts.escalation is not None
    return Supervisor(
        Watch(parts.guard, parts.escalation, preemption, watchdog, events),
        config=run.config.resilience,
        parts=parts,
        saver=saver,
        reporter=reporter,
        root=run.paths.root if run.paths else None,
        runtime=run.runtime,
        beta2=beta2,
    )


def build_measurement(
    run: Run,
    parts: RunParts,
    plan: TrainPlan,
    work: Work,
    *,
    train_step: TrainStep,
    supervisor: Supervisor,
    reporter: Reporter | None,
) -> Measurement:
    """What a run measures of itself."""
    telemetry = Telemetry(
        parts.model,
        parts.optimizer,
        every=run.config.resilience.telemetry_every_n_steps,
        autocast=train_step.precision.autocast,
    )
    return Measurement(
        plan,
        work,
        parts=parts,
        compute_clock=train_step.compute_clock,
        meter=build_meter(run, parts.loader),
        telemetry=telemetry,
        supervisor=supervisor,
        reporter=reporter,
        runtime=run.runtime,
    )


def build_device_loading(
    built: BuiltModel, precision: Precision, *, device: torch.device, text_packing: str
) -> Callable[[Iterator[Batch]], Iterator[DeviceBatch]]:
    """What brings the loader's batches to the device, normalised."""
    mean, std = built.preprocess.mean, built.preprocess.std
    pack = build_packer(built.config, text_packing=text_packing)
    convert = partial(
        to_device,
        mean=mean,
        std=std,
        device=device,
        dtype=precision.input_dtype,
        pack=pack,
        memory_format=image_memory_format(built.model),
    )
    return partial(load_to_device, to_device=convert, device=device)


def build_schedule(config: ScheduleConfig, *, lr: float, plan: TrainPlan, state: TrainState) -> Callable[[int], float]:
    """The learning rate by samples seen: after as many of them the same rate, whatever the global batch."""
    schedule_batch = state.schedule_batch
    schedule = build_lr_schedule(config, lr=lr, steps_per_epoch=plan.samples_per_epoch / schedule_batch)
    return lambda seen: schedule(seen // schedule_batch)


def build_meter(run: Run, loader: TrainLoader) -> DataMeter:
    slots = min(FEWEST_SLOTS, loader.source.slots_per_epoch)
    return DataMeter(
        loader,
        rank=run.runtime.rank,
        budget=BadSampleBudget(run.config.data.max_bad_samples, slots=slots),
        sum_over_ranks=all_reduce_sum,
        gather=gather_objects,
    )


def build_saver(run: Run, parts: RunParts, *, settings: Mapping[str, Any]) -> Saver | None:
    """None with ``--logs none``; ``settings`` are what a checkpoint remembers of the flags."""
    if run.paths is None:
        return None
    config = run.config
    return Saver(
        config.checkpoint,
        checkpointer=Checkpointer(
            run.paths.checkpoints,
            keep=config.checkpoint.keep_checkpoints,
            keep_every=config.checkpoint.keep_every_n_steps,
            generation=run.lease.generation if run.lease else 0,
            fence=run.lease.check if run.lease else None,
        ),
        parts=parts,
        runtime=run.runtime,
        run_config=settings,
        name=run.name,
        epochs=config.schedule.epochs,
        epoch_files=not (config.engine.fsdp and config.engine.fsdp_checkpoint == "sharded"),
    )


def choose_attention(config: Config, runtime: Runtime) -> AbstractContextManager[object]:
    """Inside it, ``--attention-kernel`` holds for the whole process. Collective: all ranks."""

    def calls() -> list[AttentionCall]:
        phases = read_phases(config).all
        return list(dict.fromkeys(call for phase in phases for call in _attention_calls(phase, runtime.device)))

    first = partial(on_first_rank, rank=runtime.rank)
    return attention_kernel(config.engine.attention_kernel, calls=calls, device=runtime.device, on_first_rank=first)


def _attention_calls(phase: Phase, device: torch.device) -> list[AttentionCall]:
    config = phase.config
    precision = build_precision(config.engine.precision, device)
    built = build_model(config, skeleton=True)
    cast_parameters(built.model, precision)
    images = torch.empty(
        (config.data.batch_size, 3, *built.config.vision_cfg.image_hw), dtype=precision.input_dtype, device="meta"
    )
    reads = cut_texts(built.config, phase.text_length)
    texts = torch.ones(config.data.batch_size, reads.text_cfg.context_length, dtype=torch.int64)
    packed = build_packer(reads, text_packing=config.engine.text_packing)(texts).to("meta")
    try:
        return attention_calls(built.model.train(), images, packed, precision=precision)
    # What a tower of others thinks of an image size, it says in its forward pass.
    except (RuntimeError, AssertionError) as error:
        height, width = built.config.vision_cfg.image_hw
        raise ValueError(
            f"--attention-kernel {config.engine.attention_kernel}: model '{built.config.name}' does not compute images "
            f"of {height} x {width}, the size of phase {phase.number}: {error}"
        ) from error


def set_device_defaults(device: torch.device) -> None:
    if device.type == "cuda":
        # TF32 for what is left in fp32, as OpenCLIP sets it: the inputs of a product lose bits, its sums do not.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
