"""Entry point of a training process: ``python -m training.main FLAGS``, one process per device.

    flags -> Config -> Runtime -> run directory -> model, data, evaluations -> resume -> train (or evaluate only)

Everything that can be wrong with a run's description is found before its first step, on every rank.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.factory import BuiltModel, create_model
from models.locking import lock_image_tower, lock_text_tower
from models.tokenizer import build_tokenizer
from models.weights import load_weights
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.run_state import RunParts, find_resume_path, read_weights, restore
from training.checkpoint.saver import Saver
from training.cli import Parsed, config_values, parse_or_exit, to_yaml
from training.config import Config, ModelConfig
from training.data.batch import to_device
from training.data.build import build_train_loader
from training.distributed.collectives import broadcast_object
from training.distributed.failure import fail_together
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime, close_runtime, start_runtime
from training.evaluation.evaluate import build_evaluators, evaluate
from training.evaluation.evaluators import Evaluator
from training.losses.build import build_loss, describe_loss
from training.naming import RunPaths, choose_run_name, claim_run_directory, params_text, run_paths
from training.observability.console import ProgressLine, set_up_logging
from training.observability.reporter import Reporter
from training.observability.sinks import JsonLinesSink, MetricSink, TensorBoardSink, WandbSink, evaluated_epochs
from training.optim.optimizer import build_optimizer
from training.optim.schedule import build_schedule
from training.precision import Precision, build_precision, cast_parameters
from training.state import TrainState
from training.train import TrainPlan, train
from training.train_step import TrainStep
from training.validation import report_targets

logger = logging.getLogger(__name__)

_EXIT_BAD_USAGE = 2


@dataclass(frozen=True)
class Run:
    """What every part of a run is told: its settings, its place among the ranks, where it writes."""

    config: Config
    runtime: Runtime
    name: str
    paths: RunPaths | None
    """None with ``--logs none``."""
    progress: ProgressLine


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one training process to its end; a failure on any rank ends all ranks with a non-zero code."""
    parsed = parse_or_exit(sys.argv[1:] if argv is None else argv)
    set_up_logging(path=None, debug=parsed.config.logging.debug, rank=0, on_screen=False)
    runtime = start_runtime(parsed.config.engine)
    with fail_together(runtime):
        start_training = _prepare(parsed, runtime)
        start_training()
    close_runtime(runtime)


def _prepare(parsed: Parsed, runtime: Runtime) -> Callable[[], None]:
    """Builds the run; what the user can mend is one line and code 2, without the traceback that hides it."""
    try:
        run = _open_run(parsed, runtime)
        return _build(run)
    except ValueError as error:
        if parsed.config.logging.debug:
            raise
        logger.error("%s", error)
        raise SystemExit(_EXIT_BAD_USAGE) from error


def _open_run(parsed: Parsed, runtime: Runtime) -> Run:
    """Names the run, claims its directory and starts the log. Collective: all ranks."""
    config = parsed.config
    name = broadcast_object(choose_run_name(config, date=datetime.now()) if runtime.is_main else None)
    paths = run_paths(config, name=name, rank=runtime.rank)
    fault = broadcast_object(_claim(paths, config) if runtime.is_main else None)  # collective: all ranks
    if fault:
        raise ValueError(fault)
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
    logger.info("Run %s: rank %d of %d on %s.", name, runtime.rank, runtime.world_size, runtime.device)
    return Run(config, runtime, name, paths, progress)


def _claim(paths: RunPaths | None, config: Config) -> str:
    """Why the run directory cannot be had; empty if it can."""
    try:
        if paths is not None:
            claim_run_directory(paths, config=config)
    except ValueError as error:
        return str(error)
    return ""


def _build(run: Run) -> Callable[[], None]:
    """Model and evaluations, and with training data everything else; returns what is left to do: to run it."""
    config, runtime = run.config, run.runtime
    _set_device_defaults(runtime.device)
    # As in OpenCLIP: one seed for the weights on all ranks, then one per rank for what each of them draws.
    _seed(config.engine.seed)
    built = _build_model(config, cache_dir=config.model.cache_dir)
    _seed(config.engine.seed + runtime.rank)
    precision = build_precision(config.engine.precision, runtime.device)
    evaluators = build_evaluators(
        config.evaluation,
        config.data,
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=config.model.cache_dir),
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    if config.data.train_data is None and config.data.dataset_type != "synthetic":
        return _build_evaluation_only(run, built, evaluators=evaluators, precision=precision)
    return _build_training(run, built, evaluators=evaluators, precision=precision)


def _build_model(config: Config, *, cache_dir: str | None) -> BuiltModel:
    """The model on the CPU, with weights loaded and towers locked as the flags say."""
    model, image = config.model, config.image
    siglip: dict[str, Any] = {"init_logit_scale": 2.302585092994046, "init_logit_bias": -10.0}  # ln 10; SigLIP, sec. 3.2
    built = create_model(
        model.model,
        pretrained=model.pretrained,
        pretrained_image=model.pretrained_image,
        cache_dir=cache_dir,
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


def _build_training(
    run: Run, built: BuiltModel, *, evaluators: Sequence[Evaluator], precision: Precision
) -> Callable[[], None]:
    config, runtime = run.config, run.runtime
    loader = build_train_loader(
        config.data,
        config.image,
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=config.model.cache_dir),
        rank=runtime.rank,
        world_size=runtime.world_size,
        accum_freq=config.engine.accum_freq,
        seed=config.engine.seed,
        pin_memory=runtime.device.type == "cuda",
    )
    plan = TrainPlan(
        steps_per_epoch=loader.num_batches // config.engine.accum_freq,
        epochs=config.schedule.epochs,
        accum_freq=config.engine.accum_freq,
        samples_per_step=config.data.batch_size * runtime.world_size * config.engine.accum_freq,
        log_every_n_steps=config.logging.log_every_n_steps,
        log_metric_every_n_steps=config.logging.log_metric_every_n_steps,
    )
    cast_parameters(built.model, precision)
    built.model.to(runtime.device)
    trained = parallelize(built.model, config=config.engine, runtime=runtime)
    optimizer = build_optimizer(built.model, config.optim)
    parts = RunParts(built.model, optimizer, precision.grad_scaler(), loader, TrainState())
    checkpointer = Checkpointer(run.paths.checkpoints if run.paths else Path(), keep=config.checkpoint.keep_checkpoints)
    _resume(run, parts, checkpointer=checkpointer, plan=plan)
    _record_settings(run, built, plan)
    return partial(
        _train_and_close,
        run,
        _build_reporter(run, plan, loader_samples=loader.num_samples, first_step=parts.state.step),
        plan=plan,
        parts=parts,
        train_step=TrainStep(
            model=trained,
            loss=build_loss(config.loss),
            optimizer=optimizer,
            scaler=parts.scaler,
            precision=precision,
            grad_clip_norm=config.optim.grad_clip_norm,
        ),
        schedule=build_schedule(config.schedule, lr=_base_lr(optimizer), steps_per_epoch=plan.steps_per_epoch),
        to_device=partial(
            to_device,
            mean=built.preprocess.mean,
            std=built.preprocess.std,
            device=runtime.device,
            dtype=precision.input_dtype,
        ),
        evaluate=partial(_evaluate_epoch, run, built, evaluators, precision),
        saver=None
        if run.paths is None
        else Saver(
            config.checkpoint,
            checkpointer=checkpointer,
            parts=parts,
            runtime=runtime,
            run_config=_plain(config_values(config)),
            name=run.name,
            epochs=config.schedule.epochs,
        ),
    )


def _train_and_close(run: Run, reporter: Reporter | None, **parts: Any) -> None:
    results = run.paths.results_jsonl if run.paths else None
    try:
        train(
            reporter=reporter,
            evaluated=lambda: evaluated_epochs(results) if results else set(),
            runtime=run.runtime,
            **parts,
        )
    finally:
        if reporter is not None:
            reporter.close()
    logger.info("Finished %s%s.", run.name, f": see {run.paths.root}" if run.paths else "")


def _build_evaluation_only(
    run: Run, built: BuiltModel, *, evaluators: Sequence[Evaluator], precision: Precision
) -> Callable[[], None]:
    """Without training data the weights are evaluated once, as in OpenCLIP."""
    epoch = 0
    if run.config.checkpoint.resume:
        checkpointer = Checkpointer(run.paths.checkpoints if run.paths else Path(), keep=2)
        path = _agreed_resume_path(run, checkpointer)
        if path is not None:
            epoch, state = read_weights(path)
            load_weights(built.model, state)
    cast_parameters(built.model, precision)
    built.model.to(run.runtime.device)

    def run_once() -> None:
        result = _evaluate_epoch(run, built, evaluators, precision, epoch, last=True)
        reporter = _build_reporter(run, None, loader_samples=0, first_step=epoch)
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


def _resume(run: Run, parts: RunParts, *, checkpointer: Checkpointer, plan: TrainPlan) -> None:
    """Restores what ``--resume`` names. Collective: all ranks."""
    if run.config.checkpoint.resume is None:
        return
    path = _agreed_resume_path(run, checkpointer)
    if path is None:
        logger.info("No checkpoint in %s yet: starting from the beginning.", checkpointer.root)
        return
    restore(
        path,
        parts,
        runtime=run.runtime,
        steps_per_epoch=plan.steps_per_epoch,
        samples_per_step=plan.samples_per_step,
    )


def _agreed_resume_path(run: Run, checkpointer: Checkpointer) -> str | None:
    """Rank 0 looks; all ranks take what it found: they may see a busy file system differently."""
    resume = run.config.checkpoint.resume
    assert resume is not None
    found = find_resume_path(resume, checkpointer=checkpointer) if run.runtime.is_main else None
    return broadcast_object(found)  # collective: all ranks


def _build_reporter(run: Run, plan: TrainPlan | None, *, loader_samples: int, first_step: int) -> Reporter | None:
    """The sinks that ``--report-to`` names, and the log; on rank 0 only."""
    if not run.runtime.is_main:
        return None
    config, paths = run.config, run.paths
    sinks: list[MetricSink] = []
    if paths is not None:
        targets = report_targets(config.logging.report_to)
        sinks.append(JsonLinesSink(paths.metrics_jsonl, first_step=first_step))
        if "tensorboard" in targets:
            sinks.append(TensorBoardSink(paths.tensorboard, first_step=first_step))
        if "wandb" in targets:
            settings = config_values(config)
            sinks.append(WandbSink(paths.root, config=config.logging, name=run.name, settings=settings))
    return Reporter(
        sinks=sinks,
        progress=run.progress,
        results_path=paths.results_jsonl if paths else None,
        samples_per_epoch=loader_samples,
        steps_per_epoch=plan.steps_per_epoch if plan else 1,
        first_step=first_step,
        total_steps=plan.total_steps if plan else 1,
    )


def _record_settings(run: Run, built: BuiltModel, plan: TrainPlan) -> None:
    """Writes params.txt and config.yaml, and says in the log what is about to happen. On rank 0."""
    if not run.runtime.is_main:
        return
    config, runtime = run.config, run.runtime
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    trained = sum(parameter.numel() for parameter in built.model.parameters() if parameter.requires_grad)
    logger.info("Model %s: %.1f M parameters, %.1f M trained.", config.model.model, parameters / 1e6, trained / 1e6)
    logger.info(
        "%d epochs of %d steps; global batch %d = %d per rank x %d ranks x %d micro-steps; precision %s.",
        plan.epochs,
        plan.steps_per_epoch,
        plan.samples_per_step,
        config.data.batch_size,
        runtime.world_size,
        plan.accum_freq,
        config.engine.precision,
    )
    # The remarks on gathering concern several ranks only.
    for line in describe_loss(config.loss)[: None if runtime.world_size > 1 else 1]:
        logger.info("%s", line)
    if run.paths is None:
        return
    facts = {
        "device": str(runtime.device),
        "rank": runtime.rank,
        "local_rank": runtime.local_rank,
        "world_size": runtime.world_size,
        "name": run.name,
    }
    run.paths.params_txt.write_text(params_text(config, paths=run.paths, facts=facts))
    run.paths.config_yaml.write_text(to_yaml(replace(config, logging=replace(config.logging, name=run.name))))
    if config.logging.copy_codebase:
        _copy_code(run.paths.code)


def _copy_code(destination: Path) -> None:
    """The packages of this program as they run now."""
    here = Path(__file__).resolve().parent.parent
    for package in ("training", "models", "slurm", "configs"):
        shutil.copytree(
            here / package, destination / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )


def _base_lr(optimizer: torch.optim.Optimizer) -> float:
    """The rate that the schedule scales: ``--lr``, or the default of an optimizer that was given none."""
    return float(optimizer.param_groups[0]["lr"])


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in JSON types."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


def _set_device_defaults(device: torch.device) -> None:
    if device.type == "cuda":
        # TF32 for what is left in fp32, as OpenCLIP sets it: the inputs of a product lose bits, its sums do not.
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


if __name__ == "__main__":
    main()
