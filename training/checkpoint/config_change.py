"""Says which settings may differ between a checkpoint and the run that goes on from it, and compares them. Pure.

FREE           where and how fast a run computes, and what people do change in a run: recorded
WITH_DATA      free if the sources changed too: recorded
FIXED          what makes it that run: refused, unless named in --allow-config-change
OF_THE_START   says how to start, not what the run is: neither compared nor recorded
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, NamedTuple

from training.cli import config_values, with_model_defaults
from training.config import Config, ModelConfig, OptimConfig
from training.flags import BY_FIELD, DEFAULTS
from training.phases import past_differs
from training.precision import PRECISIONS


class Rule(Enum):
    """What becomes of a setting that differs."""

    FREE = "free"
    WITH_DATA = "free if the sources changed"
    FIXED = "refused unless named"
    OF_THE_START = "of the start"


_SOURCES = ("train_data", "train_data_upsampling_factors", "train_data_manifest")
_STREAM = ("seed", "dataset_resampled")
"""Beside the sources, what the order of samples depends on."""

_BY_RULE: Mapping[Rule, tuple[str, ...]] = {
    Rule.FREE: (
        *_SOURCES,
        # how data is read and found in its files
        *("dataset_type", "csv_separator", "csv_img_key", "csv_caption_key", "image_key", "text_key", "json_text_key"),
        *("json_text_key_probs", "max_image_pixels", "data_lanes", "shuffle_block", "decode", "max_bad_samples"),
        *("s3_native", "cache_shards", "cache_gib", "trace_samples", "batch_size", "workers"),
        # augmentation
        *("image_mean", "image_std", "image_interpolation", "image_resize_mode", "aug_cfg"),
        # optimizer: what does not change the meaning of its state
        *("lr", "beta1", "beta2", "eps"),
        # engine
        *("device", "dist_url", "dist_backend", "no_set_device_rank", "ddp_static_graph", "precision", "accum_freq"),
        *("slurm_host_suffix", "fsdp", "fsdp_shard_ranks", "fsdp_no_reshard_after_forward", "fsdp_offload_cpu"),
        *("fsdp_checkpoint", "text_packing", "attention_kernel", "channels_last", "fp8", "grad_checkpointing_policy"),
        *("grad_reduce_dtype", "gc_every_n_steps", "gather_dtype"),
        *("grad_checkpointing", "torchcompile", "torchcompile_strategy", "torchcompile_backend", "torchcompile_mode"),
        "cache_dir",
        # what is saved, and how often
        *("save_frequency", "save_most_recent", "save_every_n_steps", "save_every_n_minutes", "keep_checkpoints"),
        *("keep_every_n_steps", "keep_best", "max_save_failures", "delete_previous_checkpoint", "remote_sync"),
        *("remote_sync_frequency", "remote_sync_protocol"),
        # resilience
        *("guard", "guard_loss_z", "guard_grad_z", "guard_warmup", "guard_damp_steps", "guard_damp_lr"),
        *("guard_damp_beta2", "guard_skip_steps", "guard_max_rewinds", "telemetry_every_n_steps"),
        *("checksum_every_n_steps", "on_divergence", "timeout_start", "timeout_step", "timeout_evaluation"),
        "timeout_heartbeat",
        # evaluation
        *("val_data", "val_num_samples", "imagenet_val", "imagenet_v2", "zeroshot_data", "retrieval_data"),
        *("zeroshot_frequency", "val_frequency", "val_retrieval_chunk_size", "evaluate_at_start"),
        # logging
        *("logs", "name", "log_local", "report_to", "wandb_notes", "wandb_project_name", "debug", "copy_codebase"),
        *("log_every_n_steps", "log_metric_every_n_steps"),
    ),
    Rule.WITH_DATA: ("train_num_samples",),
    Rule.FIXED: (
        *_STREAM,
        *("model", "pretrained", "pretrained_image", "lock_image", "lock_image_unlocked_groups"),
        *("lock_image_freeze_bn_stats", "lock_text", "lock_text_unlocked_layers", "lock_text_freeze_layer_norm"),
        *("force_context_length", "force_image_size", "force_quick_gelu", "force_patch_dropout", "force_custom_text"),
        *("local_loss", "gather_with_grad", "siglip", "loss_dist_impl", "use_bn_sync"),
        *("opt", "wd", "momentum", "opt_kwargs", "wd_exclude", "grad_clip_norm"),
        *("epochs", "epochs_cooldown", "warmup", "skip_scheduler", "lr_scheduler", "lr_cooldown_end"),
        *("lr_cooldown_power", "phases"),
    ),
    Rule.OF_THE_START: ("resume", "allow_restart_from_zero", "allow_config_change", "branch_from", "take_over"),
}
RULES: Mapping[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names}
"""Of every field of every section of ``Config``."""

_UNSETTLING = frozenset(
    {*_SOURCES, *_STREAM, "global_batch_size", "precision", "aug_cfg", "image_mean", "image_std", "lr", "beta1"}
    | {"beta2", "eps", "opt", "model", "siglip", "train_num_samples", "force_patch_dropout"}
)
_SAME_PRECISION = {"amp_bfloat16": "amp_bf16"}


class Difference(NamedTuple):
    """One setting, or fact of the job, that is not what it was."""

    name: str
    saved: Any
    now: Any


@dataclass(frozen=True)
class ConfigChange:
    """What differs between the run that wrote a checkpoint and the one that goes on from it."""

    recorded: tuple[Difference, ...] = ()
    """Allowed, and written into the run's history."""
    refused: tuple[Difference, ...] = ()
    allows_other_data: bool = False
    """The user means the data to change: the stream of samples may be another one."""

    @property
    def unsettles(self) -> bool:
        """Whether loss and gradients may be of another size than before: statistics of them mean nothing then."""
        return any(difference.name in _UNSETTLING for difference in self.recorded)

    def as_json(self) -> dict[str, list[Any]]:
        """{name: [saved, now]} of what is recorded."""
        return {difference.name: [difference.saved, difference.now] for difference in self.recorded}


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Sequence[str] = ()) -> ConfigChange:
    """Compares two sets of settings by field name; a setting that ``saved`` does not know yet had its default.

    Args:
        allowed: names, as fields or as flags, that may differ although they are FIXED.
    """
    named = {name.removeprefix("--").replace("-", "_") for name in allowed}
    before = _resolved({**_defaults(), **saved})
    after = _resolved({**_defaults(), **now})
    differing = [
        Difference(name, before[name], after[name])
        for name, rule in RULES.items()
        if rule is not Rule.OF_THE_START and before[name] != after[name]
    ]
    other_sources = any(difference.name in _SOURCES for difference in differing)
    free = {Rule.FREE} | ({Rule.WITH_DATA} if other_sources or named.intersection(_SOURCES) else set())
    recorded = tuple(entry for entry in differing if RULES[entry.name] in free or entry.name in named)
    return ConfigChange(
        recorded=recorded,
        refused=tuple(entry for entry in differing if entry not in recorded),
        allows_other_data=other_sources
        or bool(named.intersection(_SOURCES))
        or any(entry.name in _STREAM for entry in recorded),
    )


def check_config_change(
    train: Mapping[str, Any], config: Config, *, world_size: int, phases: Any = None, branches: bool = False
) -> ConfigChange:
    """Whether a run with this configuration may go on from a checkpoint, and what is to be recorded of it.

    Args:
        train: the checkpoint's train.json.
        phases: what the file of ``--phases`` says, in JSON types: its name is of no account.
        branches: a new run starts from the checkpoint: everything may differ.

    Raises:
        ValueError: settings differ that may not; the message lists them all.
    """
    saved = train.get("config", {})
    allowed = tuple(RULES) if branches else config.checkpoint.allow_config_change
    change = compare(saved, config_values(config) | {"phases": phases}, allowed=allowed)
    if change.refused:
        raise ValueError(_refusal(change, step=int(train["step"])))
    return replace(change, recorded=(*change.recorded, *_job_differences(train, config, world_size=world_size)))


def saved_global_batch(train: Mapping[str, Any]) -> int:
    """Samples of all ranks and micro-steps in a step of the run that wrote a train.json."""
    saved = {**_defaults(), **train.get("config", {})}
    return int(train.get("world_size", 1)) * int(saved["batch_size"]) * int(saved["accum_freq"])


def remarks(change: ConfigChange, train: Mapping[str, Any], config: Config) -> list[str]:
    """What the log should say about a change, a line each."""
    lines = []
    if change.recorded:
        shown = ", ".join(f"{_label(entry.name)} {entry.saved!r} -> {entry.now!r}" for entry in change.recorded)
        lines.append(f"Changed since step {train['step']}: {shown}.")
    phases = next((entry for entry in change.recorded if entry.name == "phases"), None)
    if phases is not None and past_differs(phases.saved, phases.now, int(train["samples_seen"])):
        lines.append(
            f"The new --phases differ also in what they say of the {train['samples_seen']} samples seen so far. That "
            "is past, and stays as it was; only its FLOPs are counted as the file says now."
        )
    has_scaler = PRECISIONS[config.engine.precision].scales_gradients
    if train.get("scaler") is not None and not has_scaler:
        lines.append(f"The loss scaler's state is dropped: --precision {config.engine.precision} has no scaler.")
    elif train.get("scaler") is None and has_scaler:
        lines.append("The checkpoint has no loss scaler: it starts at its initial scale.")
    return lines


def _defaults() -> dict[str, Any]:
    return config_values(DEFAULTS)


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """In JSON types, with what the model's name fills in where nothing was given."""
    plain = {name: _plain(value) for name, value in settings.items()}
    names = [field.name for field in fields(OptimConfig)]
    optim = OptimConfig(**{name: plain[name] for name in names})
    filled = with_model_defaults(Config(model=ModelConfig(model=plain["model"]), optim=optim)).optim
    plain |= {name: _plain(getattr(filled, name)) for name in names}
    plain["precision"] = _SAME_PRECISION.get(plain["precision"], plain["precision"])
    return plain


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _job_differences(train: Mapping[str, Any], config: Config, *, world_size: int) -> list[Difference]:
    saved_world, before = int(train.get("world_size", world_size)), saved_global_batch(train)
    after = world_size * config.data.batch_size * config.engine.accum_freq
    facts = (Difference("world_size", saved_world, world_size), Difference("global_batch_size", before, after))
    return [fact for fact in facts if fact.saved != fact.now]


def _refusal(change: ConfigChange, *, step: int) -> str:
    labels = [_label(entry.name) for entry in change.refused]
    width, saved_width = max(map(len, labels)), max(len(repr(entry.saved)) for entry in change.refused)
    lines = [
        f"  {label:<{width}}  saved {entry.saved!r:<{saved_width}}  now {entry.now!r}"
        for label, entry in zip(labels, change.refused, strict=True)
    ]
    names = " ".join(label.removeprefix("--") for label in labels)
    return "\n".join(
        [
            f"Settings differ from those that the checkpoint of step {step} was trained with:",
            *lines,
            f"Give the saved values; or pass --allow-config-change {names} to go on with the new ones; or "
            "start another run from the checkpoint with --branch-from RUN@STEP and another --name.",
        ]
    )


def _label(name: str) -> str:
    """As a flag, if it is one."""
    return BY_FIELD[name].option if name in BY_FIELD else name
