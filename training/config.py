"""The frozen configuration of a run, by section: every default of every flag lives here and nowhere else.

A field's name is its flag's name (``--train-data`` is ``DataConfig.train_data``); the parser in ``cli.py`` finds the
section by the field. Facts known only at run time (rank, device, the step resumed from) never enter it.
No torch here: a login node checks a configuration without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are batched."""

    train_data: str | None = None
    train_data_upsampling_factors: str | None = None
    train_data_manifest: str | None = None
    val_data: str | None = None
    train_num_samples: int | None = None
    val_num_samples: int | None = None
    dataset_type: str = "auto"
    dataset_resampled: bool = False
    csv_separator: str = "\t"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    image_key: str = "jpg;png;jpeg;webp"
    text_key: str = "txt"
    json_text_key: str | None = None
    """Caption field(s) of the .json member, ``;`` between several."""
    json_text_key_probs: tuple[float, ...] | None = None
    """How often each of them is taken; None: the first that holds text."""
    max_image_pixels: int = 89_478_485
    """Larger images are skipped before they are decoded, and counted; 0 is no limit. Where Pillow begins to warn."""
    data_lanes: int = 0
    """Streams that the data is dealt to, whatever the number of ranks; 0 chooses, or keeps a resumed run's."""
    shuffle_block: int = 0
    """Samples of one lane that are shuffled among each other; 0 chooses, or keeps a resumed run's."""
    decode: str = "fast"
    """``gpu``: most JPEGs are decoded on the device, in the pixels of its decoder (docs/data.md)."""
    max_bad_samples: float = 0.1
    """Fraction of the samples read that may be unusable before the run ends; 1 never ends it."""
    s3_native: str = "on"
    cache_shards: str | None = None
    """Directory for local copies of remote shards."""
    cache_gib: float = 100.0
    trace_samples: bool = False
    """Write down which samples every step consumed (12 bytes each)."""
    batch_size: int = 64
    """Samples per rank and micro-step."""
    workers: int = 4
    """Loader processes per rank."""


@dataclass(frozen=True)
class ImageConfig:
    """Preprocessing and augmentation of images; None keeps the model's own value."""

    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    image_interpolation: str | None = None
    image_resize_mode: str | None = None
    aug_cfg: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, from which weights, with which parts frozen."""

    model: str = "RN50"
    pretrained: str = ""
    pretrained_image: bool = False
    cache_dir: str | None = None
    lock_image: bool = False
    lock_image_unlocked_groups: int = 0
    lock_image_freeze_bn_stats: bool = False
    lock_text: bool = False
    lock_text_unlocked_layers: int = 0
    lock_text_freeze_layer_norm: bool = False
    force_context_length: int | None = None
    force_image_size: tuple[int, ...] | None = None
    force_quick_gelu: bool = False
    force_patch_dropout: float | None = None
    force_custom_text: bool = False


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss. Every combination gives the gradient of the global batch."""

    local_loss: bool = False
    gather_with_grad: bool = False
    siglip: bool = False
    loss_dist_impl: str | None = None
    gather_dtype: str = "fp32"
    """Type in which text features go over the network; their gradients go in fp32."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer; None for lr, betas and eps is filled in from the model's name, as in OpenCLIP."""

    opt: str = "adamw"
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    wd: float = 0.2
    momentum: float | None = None
    opt_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wd_exclude: tuple[str, ...] = ()
    grad_clip_norm: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and the learning rate on the way. ``warmup`` counts optimizer steps."""

    epochs: int = 32
    epochs_cooldown: int | None = None
    warmup: int = 10_000
    skip_scheduler: bool = False
    lr_scheduler: str = "cosine"
    lr_cooldown_end: float = 0.0
    lr_cooldown_power: float = 1.0
    phases: str | None = None
    """File that says how image size, batch size, text length, dropout and augmentation follow the samples seen."""


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed: devices, precision, memory, processes."""

    device: str = "cuda"
    dist_url: str | None = None
    dist_backend: str | None = None
    slurm_host_suffix: str = "auto"
    """What is added to the first host's name under srun without MASTER_ADDR; ``auto`` knows the JSC machines."""
    no_set_device_rank: bool = False
    ddp_static_graph: bool = False
    use_bn_sync: bool = False
    fsdp: bool = False
    """Each rank keeps a shard of weights, gradients and optimizer state instead of a copy."""
    fsdp_shard_ranks: int = 0
    """Neighbouring ranks that share one copy of the state (HSDP); 0 is all ranks."""
    fsdp_no_reshard_after_forward: bool = False
    fsdp_offload_cpu: bool = False
    fsdp_checkpoint: str = "full"
    """``full`` also writes ``epoch_N.pt``; step checkpoints are sharded either way."""
    precision: str = "amp_bf16"
    accum_freq: int = 1
    text_packing: str = "auto"
    """Whether captions are computed without their padding, where that changes no feature."""
    attention_kernel: str = "auto"
    """Which of PyTorch's kernels computes attention, but for packed texts; ``auto`` leaves it to PyTorch."""
    channels_last: str = "auto"
    """Whether convolutional towers compute in NHWC order; ``auto`` is on for them on a GPU."""
    fp8: str = "off"
    """How the linear layers of blocks are scaled to fp8."""
    grad_checkpointing: bool = False
    grad_checkpointing_policy: str = "full"
    """With ``grad_checkpointing``: ``full`` keeps each block's input only, ``selective`` what is dear to compute."""
    grad_reduce_dtype: str = "fp32"
    """Type in which gradients go over the network."""
    gc_every_n_steps: int = 1000
    """Python collects garbage after every so many steps, on all ranks at once; 0 leaves it to Python."""
    torchcompile: bool = False
    torchcompile_strategy: str = "block"
    """``block``: each block by itself; ``model``: each tower; OpenCLIP's ``task`` and ``step`` do as ``model``."""
    torchcompile_backend: str | None = None
    torchcompile_mode: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, how often, and what a run starts from."""

    resume: str | None = None
    save_frequency: int = 1
    """Epochs between ``epoch_N.pt`` exports; 0 writes the last one only."""
    save_most_recent: bool = False
    save_every_n_steps: int = 0
    """Steps between step checkpoints within an epoch; 0 saves at the ends of epochs only."""
    save_every_n_minutes: float = 0.0
    """Minutes between step checkpoints, by rank 0's clock; 0 is never."""
    keep_checkpoints: int = 2
    """Newest step checkpoints kept on disk (at least 2: the newest may be the one that is damaged)."""
    keep_every_n_steps: int = 0
    """Step checkpoints at multiples of this are kept for good; 0 keeps none."""
    keep_best: str | None = None
    """Metric of the evaluation whose best step checkpoint is kept."""
    max_save_failures: int = 3
    """Saves in a row that may fail before the run ends."""
    delete_previous_checkpoint: bool = False
    allow_restart_from_zero: bool = False
    """Start from the beginning although the run has checkpoints, none of which can be used."""
    allow_config_change: tuple[str, ...] = ()
    """Settings, named as flags, that may differ from the checkpoint's beside those that always may."""
    branch_from: str | None = None
    """RUN@STEP: a checkpoint of another run that this one starts from."""
    remote_sync: str | None = None
    """URL under which the run directory is mirrored."""
    remote_sync_frequency: int = 300
    """Seconds between two rounds of mirroring."""
    remote_sync_protocol: str = "s3"


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about bad steps, hangs, silent corruption, and other jobs in its directory."""

    guard: str = "on"
    """Whether bad steps are skipped; ``off`` only measures."""
    guard_loss_z: float = 8.0
    """Standard deviations above its mean at which a loss is bad."""
    guard_grad_z: float = 8.0
    """The same for the logarithm of the gradient norm."""
    guard_warmup: int = 100
    """Good steps before the statistics are trusted; until then only what is not finite is bad."""
    guard_damp_steps: int = 500
    """How long beta2 and learning rate stay lowered after repeated bad steps."""
    guard_damp_lr: float = 0.5
    guard_damp_beta2: float = 0.95
    guard_skip_steps: int = 200
    """Steps' worth of data left out after the onset of a spike that was rewound."""
    guard_max_rewinds: int = 3
    """Rewinds without progress in between before the run stops for good."""
    telemetry_every_n_steps: int = 50
    """Steps between measurements of updates, gradients and activations by layer; 0 is never."""
    checksum_every_n_steps: int = 1000
    """Steps between comparisons of the ranks' parameters; 0 is never."""
    on_divergence: str = "stop"
    """What follows when they differ."""
    timeout_start: float = 1800.0
    """Seconds without progress until the first step is done that count as a hang."""
    timeout_step: float = 600.0
    """The same for every later step."""
    timeout_evaluation: float = 3600.0
    """The same for an evaluation, a save or a rewind."""
    timeout_heartbeat: float = 120.0
    """Seconds a process may be without any sign of life; 0 starts no monitor."""
    take_over: bool = False
    """Take the run directory from a job that cannot be seen to have ended."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training. Frequencies count epochs; 0 is never."""

    imagenet_val: str | None = None
    imagenet_v2: str | None = None
    zeroshot_data: str | None = None
    """``::``-joined webdataset evaluation sets (class names and templates beside the tars)."""
    retrieval_data: str | None = None
    """``::``-joined webdataset retrieval sets (several captions per image, one per line)."""
    zeroshot_frequency: int = 2
    val_frequency: int = 1
    val_retrieval_chunk_size: int = 4096
    evaluate_at_start: bool = False
    """Also evaluate before the first step: the level that training starts from."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where a run writes, and what it reports."""

    logs: str = "./logs/"
    name: str | None = None
    log_local: bool = False
    report_to: str = ""
    wandb_notes: str = ""
    wandb_project_name: str = "open-clip"
    debug: bool = False
    copy_codebase: bool = False
    log_every_n_steps: int = 100
    log_metric_every_n_steps: int = 10


@dataclass(frozen=True)
class Config:
    """A whole run. Only main, train and commands see all of it; every builder takes its own section."""

    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
