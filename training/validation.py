"""Checks a configuration without torch, files or other processes: ranges, choices, and settings that need each other.

``validate`` refuses what cannot work. ``inert_settings`` names what was set and changes nothing, so that a setting is
never ignored without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from training.config import Config, DataConfig, EngineConfig, OptimConfig
from training.flags import BY_FIELD, DEFAULTS, FLAGS, Flag, Verdict, nearest, setting_of

AUGMENTATION_KEYS = (
    "scale",
    "ratio",
    "color_jitter",
    "re_prob",
    "re_count",
    "use_timm",
    "color_jitter_prob",
    "gray_scale_prob",
    "openclip_keys",
)
"""OpenCLIP's keys, and ``openclip_keys``: read them as OpenCLIP does, which drops some of them."""

OWN_OPTIMIZERS = ("adamw", "stableadamw", "nadamw")
"""Names that ``--opt`` knows, beside ``timm/NAME``."""

_REPORT_TARGETS = ("tensorboard", "wandb")
_FP16 = ("fp16", "pure_fp16")
_MOST_RANKS_IN_BF16 = 64
"""Sums over more ranks lose what the later ones add: docs/distributed.md has the errors."""
_WITH_FP8 = ("amp_bf16", "amp_bfloat16", "bf16", "pure_bf16")


@dataclass(frozen=True)
class _Range:
    """Numbers a setting may take. NaN is in no range."""

    low: float = 0.0
    high: float = math.inf
    low_included: bool = True
    high_included: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'at least' if self.low_included else 'more than'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'at most' if self.high_included else 'less than'} {self.high:g}"


_POSITIVE = _Range(low_included=False)
_NOT_NEGATIVE = _Range()
_ONE_OR_MORE = _Range(1)
_BELOW_ONE = _Range(high=1)
_PROBABILITY = _Range(high=1, high_included=True)

_RANGES: Mapping[str, _Range] = {
    "train_num_samples": _ONE_OR_MORE,
    "val_num_samples": _NOT_NEGATIVE,
    "max_image_pixels": _NOT_NEGATIVE,
    "data_lanes": _NOT_NEGATIVE,
    "shuffle_block": _NOT_NEGATIVE,
    "max_bad_samples": _PROBABILITY,
    "cache_gib": _POSITIVE,
    "batch_size": _ONE_OR_MORE,
    "workers": _NOT_NEGATIVE,
    "lock_image_unlocked_groups": _NOT_NEGATIVE,
    "lock_text_unlocked_layers": _NOT_NEGATIVE,
    "force_context_length": _ONE_OR_MORE,
    "force_patch_dropout": _BELOW_ONE,
    "lr": _POSITIVE,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "eps": _POSITIVE,
    "wd": _NOT_NEGATIVE,
    "momentum": _BELOW_ONE,
    "grad_clip_norm": _POSITIVE,
    "epochs": _ONE_OR_MORE,
    "epochs_cooldown": _ONE_OR_MORE,
    "warmup": _NOT_NEGATIVE,
    "lr_cooldown_end": _NOT_NEGATIVE,
    "lr_cooldown_power": _POSITIVE,
    "accum_freq": _ONE_OR_MORE,
    "fsdp_shard_ranks": _NOT_NEGATIVE,
    "gc_every_n_steps": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
    "save_frequency": _NOT_NEGATIVE,
    "save_every_n_steps": _NOT_NEGATIVE,
    "save_every_n_minutes": _NOT_NEGATIVE,
    "keep_checkpoints": _Range(2),
    "keep_every_n_steps": _NOT_NEGATIVE,
    "max_save_failures": _ONE_OR_MORE,
    "remote_sync_frequency": _ONE_OR_MORE,
    "guard_loss_z": _POSITIVE,
    "guard_grad_z": _POSITIVE,
    "guard_warmup": _Range(2),
    "guard_damp_steps": _ONE_OR_MORE,
    "guard_damp_lr": _Range(low_included=False, high=1, high_included=True),
    "guard_damp_beta2": _BELOW_ONE,
    "guard_skip_steps": _NOT_NEGATIVE,
    "guard_max_rewinds": _NOT_NEGATIVE,
    "telemetry_every_n_steps": _NOT_NEGATIVE,
    "checksum_every_n_steps": _NOT_NEGATIVE,
    "timeout_start": _POSITIVE,
    "timeout_step": _POSITIVE,
    "timeout_evaluation": _POSITIVE,
    "timeout_heartbeat": _NOT_NEGATIVE,
    "zeroshot_frequency": _NOT_NEGATIVE,
    "val_frequency": _NOT_NEGATIVE,
    "val_retrieval_chunk_size": _NOT_NEGATIVE,
    "log_every_n_steps": _ONE_OR_MORE,
    "log_metric_every_n_steps": _ONE_OR_MORE,
}
# Texts that make no sense empty; an unset shell variable is the usual cause.
_NEVER_EMPTY = (
    "train_data",
    "val_data",
    "csv_separator",
    "csv_img_key",
    "csv_caption_key",
    "image_key",
    "text_key",
    "json_text_key",
    "train_data_manifest",
    "cache_shards",
    "model",
    "phases",
    "device",
    "resume",
    "keep_best",
    "branch_from",
    "remote_sync",
    "imagenet_val",
    "imagenet_v2",
    "zeroshot_data",
    "retrieval_data",
    "name",
)


def validate(config: Config) -> None:
    """Checks every setting, and those that need each other.

    Raises:
        ValueError: one line per problem: the flag, its value, what is wrong, what to do.
    """
    problems = list(
        chain(
            _choice_problems(config),
            _range_problems(config),
            _empty_problems(config),
            _data_problems(config),
            _image_problems(config),
            _augmentation_problems(config.image.aug_cfg),
            _optimizer_problems(config),
            _fsdp_problems(config),
            _fp8_problems(config.engine),
            _reduce_problems(config.engine),
            _schedule_problems(config),
            _checkpoint_problems(config),
            _report_problems(config.logging.report_to),
        )
    )
    if problems:
        raise ValueError("\n".join(problems))


def check_reduce_dtype(engine: EngineConfig, *, world_size: int) -> None:
    """What can only be said once the ranks are known.

    Raises:
        ValueError: gradients of too many ranks would be summed in bf16.
    """
    if engine.grad_reduce_dtype == "bf16" and world_size > _MOST_RANKS_IN_BF16:
        raise ValueError(
            f"--grad-reduce-dtype bf16 over {world_size} ranks: a sum in bf16, which has 8 bits, loses most of what "
            f"the later ranks add; it is exact enough for {_MOST_RANKS_IN_BF16} ranks or fewer. Use fp32."
        )


def report_targets(report_to: str) -> frozenset[str]:
    """Which of tensorboard and wandb ``--report-to`` asks for; names are found anywhere in it, `all` is both."""
    return frozenset(target for target in _REPORT_TARGETS if target in report_to or "all" in report_to)


def logs_disabled(logs: str) -> bool:
    """Whether ``--logs`` asks for neither logs nor checkpoints."""
    return logs.lower() in ("", "none")


def unknown_choice(flag: Flag, value: str) -> str | None:
    """What is wrong with a value of a flag with choices; None if nothing."""
    if value in flag.refused_values:
        return f"{flag.option} {value} is refused: {flag.refused_values[value]}."
    if not flag.choices or value in flag.choices:
        return None
    return f"{flag.option} {value!r} is not one of {', '.join(flag.choices)}{nearest(value, flag.choices)}."


def _choice_problems(config: Config) -> Iterator[str]:
    for flag in FLAGS:
        value = setting_of(config, flag) if flag.verdict is Verdict.SUPPORTED else None
        problem = unknown_choice(flag, value) if isinstance(value, str) else None
        if problem is not None:
            yield problem
    opt = config.optim.opt
    if opt not in OWN_OPTIMIZERS and not (opt.startswith("timm/") and opt != "timm/"):
        near = nearest(opt, (*OWN_OPTIMIZERS, f"timm/{opt}"))
        yield f"--opt {opt!r} is not {', '.join(OWN_OPTIMIZERS)} or timm/NAME{near}."


def _range_problems(config: Config) -> Iterator[str]:
    for field_name, allowed in _RANGES.items():
        flag = BY_FIELD[field_name]
        value = setting_of(config, flag)
        if value is not None and value == math.inf:
            yield f"{flag.option} {value} must be finite."
        elif value is not None and value not in allowed:
            yield f"{flag.option} {value} must be {allowed}."


def _empty_problems(config: Config) -> Iterator[str]:
    for field_name in _NEVER_EMPTY:
        flag = BY_FIELD[field_name]
        value = setting_of(config, flag)
        # A separator is white space, or a semicolon, more often than not.
        stripped = value if value is None or field_name == "csv_separator" else value.strip(" ;")
        if stripped == "":
            yield f"{flag.option} {value!r} is empty (an unset shell variable?): give it a value or leave the flag out."


def _data_problems(config: Config) -> Iterator[str]:
    data, evaluation = config.data, config.evaluation
    synthetic = data.dataset_type == "synthetic"
    evaluation_sets = (
        data.val_data,
        evaluation.imagenet_val,
        evaluation.imagenet_v2,
        evaluation.zeroshot_data,
        evaluation.retrieval_data,
    )
    if not _trains(data) and not any(evaluation_sets):
        yield (
            "there is nothing to train on and nothing to evaluate: pass --train-data, --dataset-type synthetic, "
            "or an evaluation set such as --val-data or --zeroshot-data."
        )
    if data.train_data_manifest is not None:
        yield from _manifest_problems(data)
    if data.json_text_key is not None:
        fields = [part.strip() for part in data.json_text_key.split(";")]
        if not all(fields) or len(set(fields)) < len(fields):
            yield f"--json-text-key {data.json_text_key} must name one or more different fields, `;` between them."
    if data.json_text_key_probs is not None:
        yield from _json_text_problems(data.json_text_key, data.json_text_key_probs)
    if data.s3_native == "off" and data.cache_shards is not None and (data.train_data or "").startswith("pipe:"):
        yield "--s3-native off runs commands, whose output --cache-shards does not keep: leave one of them out."
    if synthetic and data.train_num_samples is None:
        yield "--dataset-type synthetic has no size of its own: pass --train-num-samples."
    if data.train_data_upsampling_factors is not None:
        yield from _upsampling_problems(data, data.train_data_upsampling_factors)


def _trains(data: DataConfig) -> bool:
    return data.train_data is not None or data.train_data_manifest is not None or data.dataset_type == "synthetic"


def _manifest_problems(data: DataConfig) -> Iterator[str]:
    option = f"--train-data-manifest {data.train_data_manifest}"
    if data.train_data is not None:
        yield f"{option} and --train-data {data.train_data} both say what to train on: leave one out."
    if data.train_data_upsampling_factors is not None:
        yield f"{option} has its own weights: leave --train-data-upsampling-factors out."
    if data.dataset_type not in ("auto", "webdataset"):
        yield f"{option} lists tar shards, not --dataset-type {data.dataset_type}: leave the type out."


def _json_text_problems(fields: str | None, probs: tuple[float, ...]) -> Iterator[str]:
    option = f"--json-text-key-probs {_joined(probs)}"
    if fields is None:
        yield f"{option} weighs the fields of --json-text-key: pass that too."
        return
    if len(probs) > len(fields.split(";")):
        yield f"{option} has more numbers than --json-text-key {fields} has fields: give at most one for each."
    if not all(0 <= prob < math.inf for prob in probs) or sum(probs) <= 0:
        yield f"{option} must be numbers of at least 0, not all 0."


def _upsampling_problems(data: DataConfig, factors: str) -> Iterator[str]:
    option = "--train-data-upsampling-factors"
    if not data.dataset_resampled:
        yield f"{option} {factors} weighs random draws of shards: pass --dataset-resampled too, or leave it out."
    parts = factors.split("::")
    num_sources = len((data.train_data or "").split("::"))
    if len(parts) != num_sources:
        yield (
            f"{option} {factors} has {len(parts)} factors for {num_sources} sources in --train-data: "
            "give one per source, joined with `::`."
        )
    weights = [_number_or_none(part) for part in parts]
    if any(weight is None or weight not in _NOT_NEGATIVE for weight in weights) or not any(weights):
        yield f"{option} {factors} must be numbers of at least 0, not all 0, joined with `::` (for example 1::2::0.5)."


def _image_problems(config: Config) -> Iterator[str]:
    for option, values in (("--image-mean", config.image.image_mean), ("--image-std", config.image.image_std)):
        if values is not None and len(values) not in (1, 3):
            yield f"{option} has {len(values)} values: give one, or one for each of the 3 channels."
        if values is not None and not all(math.isfinite(value) for value in values):
            yield f"{option} {_joined(values)} must be finite numbers."
    if any(value <= 0 for value in config.image.image_std or ()):
        yield f"--image-std {_joined(config.image.image_std or ())} divides pixels: every value must be more than 0."
    size = config.model.force_image_size
    if size is not None and (len(size) not in (1, 2) or min(size) < 1):
        yield f"--force-image-size {_joined(size)} must be one positive size, or a height and a width."


def _augmentation_problems(aug_cfg: Mapping[str, Any]) -> Iterator[str]:
    for key, value in aug_cfg.items():
        if key not in AUGMENTATION_KEYS:
            hint = " (use --image-interpolation)" if key == "interpolation" else nearest(key, AUGMENTATION_KEYS)
            yield f"--aug-cfg {key}={value} is not an augmentation key{hint}: it has {', '.join(AUGMENTATION_KEYS)}."
        elif value is not None and not _fits_augmentation(key, value):
            yield f"--aug-cfg {key}={value!r} must be {_AUGMENTATION_VALUES[key]}; quote it: --aug-cfg {key}='...'."
    as_openclip_drops_it = aug_cfg.get("openclip_keys") and aug_cfg.get("use_timm")
    if aug_cfg.get("color_jitter_prob") and aug_cfg.get("color_jitter") is None and not as_openclip_drops_it:
        yield (
            f"--aug-cfg color_jitter_prob={aug_cfg['color_jitter_prob']} has no color_jitter to apply: "
            "add color_jitter='(0.32, 0.32, 0.32, 0.08)', or leave it out."
        )


_AUGMENTATION_VALUES: Mapping[str, str] = {
    "scale": "two shares of the image's area, (least, most), more than 0",
    "ratio": "two aspect ratios, (least, most), more than 0",
    "color_jitter": "a strength, or 3 or 4 strengths (brightness, contrast, saturation, hue), of at least 0",
    "re_prob": "a probability",
    "re_count": "a whole number of at least 1",
    "use_timm": "True or False",
    "color_jitter_prob": "a probability",
    "gray_scale_prob": "a probability",
    "openclip_keys": "True or False",
}


def _fits_augmentation(key: str, value: Any) -> bool:
    if key in ("use_timm", "openclip_keys"):
        return isinstance(value, bool)
    if key == "re_count":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if key.endswith("_prob"):
        return _all_numbers([value]) and value in _PROBABILITY
    if key == "color_jitter":
        strengths = list(value) if isinstance(value, tuple | list) else [value] * 3
        return len(strengths) in (3, 4) and _all_numbers(strengths) and all(item in _NOT_NEGATIVE for item in strengths)
    if not isinstance(value, tuple | list) or len(value) != 2 or not _all_numbers(value):
        return False
    least, most = value
    return bool(0 < least <= most < math.inf)


def _optimizer_problems(config: Config) -> Iterator[str]:
    optim = config.optim
    if not _is_timm(optim):
        return
    if (optim.beta1 is None) != (optim.beta2 is None):
        yield f"--opt {optim.opt} needs both --beta1 and --beta2, or neither: give the other one too."
    if optim.wd_exclude:
        yield f"--opt {optim.opt} groups parameters by timm's own rule: leave --wd-exclude out, or use --opt adamw."


# Optimizers of timm's that update every element by itself. The others take norms or factors of whole tensors, of which
# a rank has some rows only.
_ELEMENTWISE = (
    "sgd",
    "momentum",
    "adam",
    "adamw",
    "adamax",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "lion",
    "adabelief",
)


def _fp8_problems(engine: EngineConfig) -> Iterator[str]:
    if engine.fp8 == "off":
        return
    if engine.precision not in _WITH_FP8:
        yield (
            f"--fp8 {engine.fp8} with --precision {engine.precision}: products are computed in fp8 and everything else "
            f"in bf16; use {', '.join(_WITH_FP8)}."
        )
    if engine.fsdp:
        yield f"--fp8 {engine.fp8} with --fsdp: not supported together. Leave one of them out."


def _reduce_problems(engine: EngineConfig) -> Iterator[str]:
    if engine.grad_reduce_dtype == "bf16" and engine.precision in _FP16:
        yield (
            f"--grad-reduce-dtype bf16 with --precision {engine.precision}: gradients have 2 bytes already, and would "
            "lose 3 of their 11 bits. Leave --grad-reduce-dtype out."
        )


def _fsdp_problems(config: Config) -> Iterator[str]:
    engine, optim = config.engine, config.optim
    if not engine.fsdp:
        return
    if engine.fsdp_shard_ranks == 1:
        yield "--fsdp-shard-ranks 1 shares nothing out: leave --fsdp out, or pass how many processes share a copy."
    if engine.precision in ("bf16", "fp16"):
        yield (
            f"--fsdp with --precision {engine.precision}, which mixes types of weights within a block: use amp_bf16 "
            "(weights are gathered in bf16 and kept in fp32), or pure_bf16."
        )
    name = optim.opt.lower().removeprefix("timm/")
    if _is_timm(optim) and name not in _ELEMENTWISE:
        yield (
            f"--fsdp with --opt {optim.opt}, which may need whole tensors where a process has some rows: use adamw, "
            f"stableadamw, nadamw, or timm/ with one of {', '.join(_ELEMENTWISE)}."
        )
    if _is_timm(optim) and optim.opt_kwargs.get("caution"):
        yield "--fsdp with --opt-kwargs caution=True, which weighs whole tensors: leave it out."
    if engine.fsdp_offload_cpu and engine.device == "cpu":
        yield "--fsdp-offload-cpu with --device cpu: the shards are in host memory already. Leave it out."
    if engine.fsdp_offload_cpu and engine.precision == "amp":
        yield (
            "--fsdp-offload-cpu with --precision amp: the loss scaler does not wait for what it copies to host memory. "
            "Use amp_bf16."
        )


def _schedule_problems(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.phases is not None and logs_disabled(config.logging.logs):
        yield (
            f"--phases {schedule.phases} with --logs {config.logging.logs or 'empty'}: a phase goes on from the "
            "checkpoint of the one before. Pass a directory to --logs."
        )
    if schedule.lr_scheduler != "const-cooldown":
        return
    if schedule.epochs_cooldown is None:
        yield "--lr-scheduler const-cooldown does not say how long to cool down: pass --epochs-cooldown."
    elif schedule.epochs_cooldown > schedule.epochs:
        yield (
            f"--epochs-cooldown {schedule.epochs_cooldown} is longer than --epochs {schedule.epochs}: "
            "cool down for at most all epochs."
        )


def _checkpoint_problems(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    unknown = [name for name in checkpoint.allow_config_change if _field(name) not in BY_FIELD]
    for name in unknown:
        known = [flag.name for flag in FLAGS if flag.verdict is Verdict.SUPPORTED]
        yield f"--allow-config-change {name}: no flag has this name{nearest(name, known)}."
    if checkpoint.branch_from is None:
        return
    run, _, step = checkpoint.branch_from.rpartition("@")
    if not run or not (step.isdecimal() or step == "latest"):
        yield f"--branch-from {checkpoint.branch_from!r} must be RUN@STEP: a run directory, @, a step or `latest`."
    if checkpoint.resume not in (None, "latest"):
        yield f"--branch-from and --resume {checkpoint.resume} both say where to start from: leave one out."


def _field(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _report_problems(report_to: str) -> Iterator[str]:
    if "trackio" in report_to:
        yield f"--report-to {report_to} is refused: trackio is not supported. Use tensorboard or wandb."
    elif report_to and report_to.lower() != "none" and not report_targets(report_to):
        names = (*_REPORT_TARGETS, "all")
        yield f"--report-to {report_to} reports nowhere{nearest(report_to, names)}: it knows {', '.join(names)}."


def inert_settings(config: Config) -> list[str]:
    """One line for each setting that differs from its default and changes nothing in this configuration."""
    return [
        f"{_words(BY_FIELD[field_name], value)} has no effect: {reason}."
        for condition, reason, field_names in _inert_groups(config)
        if condition
        for field_name in field_names
        if (value := setting_of(config, BY_FIELD[field_name])) != setting_of(DEFAULTS, BY_FIELD[field_name])
    ]


_IMAGE_LOCK = ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats")
_TEXT_LOCK = ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm")
_COOLDOWN = ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power")
_WRITTEN = (
    "name",
    "log_local",
    "copy_codebase",
    "save_frequency",
    "save_most_recent",
    "save_every_n_steps",
    "save_every_n_minutes",
    "keep_checkpoints",
    "keep_every_n_steps",
    "keep_best",
    "max_save_failures",
    "delete_previous_checkpoint",
    "remote_sync",
    "take_over",
)


def _inert_groups(config: Config) -> list[tuple[bool, str, tuple[str, ...]]]:
    """(does it apply, why, settings that have no effect then)."""
    model, schedule, evaluation, logging = config.model, config.schedule, config.evaluation, config.logging
    has_zero_shot = any((evaluation.imagenet_val, evaluation.imagenet_v2, evaluation.zeroshot_data))
    dataset_type = config.data.dataset_type
    no_cooldown = schedule.lr_scheduler != "const-cooldown"
    return [
        (not model.lock_image, "--lock-image is not given", _IMAGE_LOCK),
        (not model.lock_text, "--lock-text is not given", _TEXT_LOCK),
        (
            schedule.skip_scheduler,
            "--skip-scheduler keeps the learning rate constant",
            ("warmup", "lr_scheduler", *_COOLDOWN),
        ),
        (
            no_cooldown and not schedule.skip_scheduler,
            f"--lr-scheduler {schedule.lr_scheduler} has no cool-down",
            _COOLDOWN,
        ),
        (
            not config.engine.torchcompile,
            "--torchcompile is not given",
            ("torchcompile_strategy", "torchcompile_backend", "torchcompile_mode"),
        ),
        (
            not config.engine.grad_checkpointing,
            "--grad-checkpointing is not given",
            ("grad_checkpointing_policy",),
        ),
        (
            not config.engine.fsdp,
            "--fsdp is not given",
            ("fsdp_shard_ranks", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu", "fsdp_checkpoint"),
        ),
        (
            config.engine.precision == "pure_bf16" and not config.engine.fsdp,
            "--precision pure_bf16 has no other gradients",
            ("grad_reduce_dtype",),
        ),
        (config.engine.fsdp, "--fsdp takes the place of DDP", ("ddp_static_graph",)),
        (not config.loss.siglip, "--siglip is not given", ("loss_dist_impl",)),
        (not _trains(config.data), "there is no training data", ("phases",)),
        (not _is_timm(config.optim), f"--opt {config.optim.opt} has no such setting", ("momentum",)),
        (
            dataset_type in ("webdataset", "synthetic"),
            f"--dataset-type {dataset_type} reads no table",
            ("csv_separator", "csv_img_key", "csv_caption_key"),
        ),
        (
            dataset_type in ("csv", "jsonl", "synthetic"),
            f"--dataset-type {dataset_type} reads no shards",
            ("dataset_resampled", "image_key", "text_key", "json_text_key", "s3_native", "cache_shards"),
        ),
        (
            config.data.json_text_key is not None,
            "--json-text-key reads captions from .json members",
            ("text_key",),
        ),
        (
            config.checkpoint.remote_sync is None,
            "--remote-sync is not given",
            ("remote_sync_frequency", "remote_sync_protocol"),
        ),
        (
            config.resilience.guard == "off",
            "--guard off acts on nothing",
            ("guard_damp_steps", "guard_damp_lr", "guard_damp_beta2", "guard_skip_steps", "guard_max_rewinds"),
        ),
        (config.resilience.checksum_every_n_steps == 0, "parameters are not compared", ("on_divergence",)),
        (config.data.cache_shards is None, "--cache-shards is not given", ("cache_gib",)),
        (
            not has_zero_shot and evaluation.retrieval_data is None and config.data.val_data is None,
            "nothing is evaluated (--val-data, --imagenet-val, --zeroshot-data, --retrieval-data)",
            ("keep_best",),
        ),
        (not has_zero_shot, "no zero-shot data is given (--imagenet-val, --zeroshot-data)", ("zeroshot_frequency",)),
        (config.data.val_data is None, "--val-data is not given", ("val_frequency", "val_num_samples")),
        ("wandb" not in report_targets(logging.report_to), "--report-to names no wandb", ("wandb_notes",)),
        (
            logs_disabled(logging.logs),
            f"--logs {logging.logs or 'with an empty value'} writes nothing",
            _WRITTEN,
        ),
        (
            logs_disabled(logging.logs) and config.checkpoint.resume == "latest",
            f"--logs {logging.logs or 'with an empty value'} holds no checkpoints, so the run starts anew",
            ("resume",),
        ),
    ]


def _is_timm(optim: OptimConfig) -> bool:
    return "timm" in optim.opt


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _all_numbers(values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _joined(values: tuple[float, ...]) -> str:
    return " ".join(str(value) for value in values)


def _words(flag: Flag, value: Any) -> str:
    return flag.option if flag.kind == "switch" else f"{flag.option} {value}"
