"""Every flag of the command line in one table: OpenCLIP 3.3.0's, those its main branch added (HEAD), and our own.

Each flag has one verdict:

    SUPPORTED   a field of a section of ``training.config.Config``; the default lives there
    IGNORED     accepted, and a warning says why it changes nothing here
    REFUSED     an error that names the nearest equivalent, as soon as it asks for something

No torch here. docs/openclip_compatibility.md holds this table as ``render_flag_table`` writes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal

from training.config import Config

Kind = Literal["text", "integer", "number", "switch", "texts", "integers", "numbers", "pairs"]
Origin = Literal["3.3.0", "HEAD", "Clipyard"]


class Verdict(Enum):
    """What becomes of a flag."""

    SUPPORTED = "supported"
    IGNORED = "no effect"
    REFUSED = "refused"


@dataclass(frozen=True)
class Flag:
    """One row of the table.

    Attributes:
        note: what the flag does; for IGNORED and REFUSED why not, and what to use instead.
        off: for IGNORED and REFUSED, OpenCLIP's default: the value that asks for nothing.
        refused_values: values that OpenCLIP knows and this program does not, with the reason.
    """

    name: str
    verdict: Verdict
    kind: Kind
    note: str
    origin: Origin = "3.3.0"
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    off: Any = None
    refused_values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def option(self) -> str:
        """As typed: ``--train-data``."""
        return f"--{self.name}"

    @property
    def field_name(self) -> str:
        """As a Python name: ``train_data``."""
        return self.name.replace("-", "_")


def _on(name: str, kind: Kind, note: str, **rest: Any) -> Flag:
    return Flag(name, Verdict.SUPPORTED, kind, note, **rest)


def _no_effect(name: str, kind: Kind, off: Any, note: str, **rest: Any) -> Flag:
    return Flag(name, Verdict.IGNORED, kind, note, off=off, **rest)


def _refused(name: str, kind: Kind, off: Any, note: str, **rest: Any) -> Flag:
    return Flag(name, Verdict.REFUSED, kind, note, off=off, **rest)


PRECISION_CHOICES = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")

_NO_AUDIO = "audio towers are not part of this program; image and text are. Train them with OpenCLIP"
_NO_NAFLEX = (
    "images of variable size are not part of this program. Use --force-image-size for another fixed size, "
    "and --force-patch-dropout to compute fewer tokens"
)
_NO_DISTILLATION = "there is no distillation loss. Use --pretrained or --pretrained-image to start from other weights"
_NO_COCA = "only CoCa models use it, and those are refused by name"
_NO_LAYER_DECAY = "learning rates per layer are not supported. Use --lock-image or --lock-text with unlocked groups"
_FIXED_TEXT = "captions have the fixed length of the model's context here, so there is no padding to choose"

FLAGS: tuple[Flag, ...] = (
    # data
    _on("train-data", "text", "Shards (brace ranges, globs, `::` between sources, `pipe:COMMAND`) or a CSV file."),
    _on(
        "train-data-upsampling-factors",
        "text",
        "One weight per source, joined with `::`: how often its shards are drawn. Needs --dataset-resampled.",
    ),
    _on(
        "train-data-manifest",
        "text",
        "A YAML or JSON file of many sources with weights that may follow a schedule, instead of --train-data.",
        origin="Clipyard",
    ),
    _on("val-data", "text", "Validation data in the same forms; evaluated on all ranks."),
    _on("train-num-samples", "integer", "Samples in an epoch; else read from sizes.json beside the shards."),
    _on("val-num-samples", "integer", "Samples of the validation data; none or 0 reads all of them."),
    _on(
        "dataset-type",
        "text",
        "How data is read; auto goes by the file name's ending.",
        choices=("webdataset", "csv", "jsonl", "synthetic", "auto"),
        refused_values=MappingProxyType({"webdataset-audio": _NO_AUDIO, "synthetic-audio": _NO_AUDIO}),
    ),
    _on("dataset-resampled", "switch", "Draw shards with replacement instead of reading each once per epoch."),
    _on("csv-separator", "text", "What separates columns; `\\t` is a tab."),
    _on("csv-img-key", "text", "Column of the image paths."),
    _on("csv-caption-key", "text", "Column of the captions."),
    _on("image-key", "text", "Ending of the image member in a tar, `;` between alternatives.", origin="HEAD"),
    _on("text-key", "text", "Ending of the caption member in a tar, `;` between alternatives.", origin="HEAD"),
    _on(
        "json-text-key",
        "text",
        "Caption field of the .json member, instead of --text-key; `;` between several.",
        origin="HEAD",
    ),
    _on("json-text-key-probs", "numbers", "How often each field of --json-text-key is taken.", origin="HEAD"),
    _on(
        "max-image-pixels",
        "integer",
        "Images with more pixels are skipped before decoding, and counted; 0 is no limit.",
        origin="HEAD",
    ),
    _on(
        "max-bad-samples",
        "number",
        "Fraction of unusable samples that ends the run, the worst shards named; 1 never does.",
        origin="Clipyard",
    ),
    _on(
        "data-lanes",
        "integer",
        "Streams that the data is dealt to, a multiple of all later rank counts; 0 chooses.",
        origin="Clipyard",
    ),
    _on(
        "shuffle-block",
        "integer",
        "Samples of one data lane that are shuffled among each other; 0 chooses.",
        origin="Clipyard",
    ),
    _on(
        "decode",
        "text",
        "fast: libjpeg-turbo, within 45 dB of reference (OpenCLIP's pixels); gpu: most JPEGs decoded on the device.",
        choices=("fast", "reference", "gpu"),
        origin="Clipyard",
    ),
    _on(
        "s3-native",
        "text",
        "on: read `pipe:aws s3 cp s3://... -` with the built-in client; off: run the command.",
        choices=("on", "off"),
        origin="Clipyard",
    ),
    _on("cache-shards", "text", "Directory that keeps local copies of remote shards.", origin="Clipyard"),
    _on("cache-gib", "number", "Size limit of --cache-shards on each machine.", origin="Clipyard"),
    _on("trace-samples", "switch", "Write down which samples every step consumed.", origin="Clipyard"),
    _on("batch-size", "integer", "Samples per process and micro-step."),
    _on("workers", "integer", "Loader processes per rank; 0 loads in the training process."),
    _no_effect("length-bucketing", "switch", False, _FIXED_TEXT, origin="HEAD"),
    _no_effect("bucket-pool", "integer", 2048, _FIXED_TEXT, origin="HEAD"),
    _no_effect("bucket-chunk", "integer", 128, _FIXED_TEXT, origin="HEAD"),
    _no_effect("bucket-prefetch-pools", "integer", 0, _FIXED_TEXT, origin="HEAD"),
    _no_effect("text-pad-multiple", "integer", None, _FIXED_TEXT, origin="HEAD"),
    # image
    _on("image-mean", "numbers", "Mean of each channel, instead of the model's own."),
    _on("image-std", "numbers", "Standard deviation of each channel, instead of the model's own."),
    _on(
        "image-interpolation",
        "text",
        "How images are resized, instead of the model's own way.",
        choices=("bicubic", "bilinear", "random"),
    ),
    _on(
        "image-resize-mode",
        "text",
        "Which side fits the model's size in evaluation, instead of the model's own choice.",
        choices=("shortest", "longest", "squash"),
    ),
    _on("aug-cfg", "pairs", "Augmentation as key=value; every key is applied or refused, none is dropped."),
    # model
    _on("model", "text", "Name of a model, hf-hub:ORG/REPO, local-dir:PATH or a .json file."),
    _on("pretrained", "text", "Weights of a whole model to start from: a tag or a file."),
    _on("pretrained-image", "switch", "Start the image tower from timm's ImageNet weights."),
    _on("cache-dir", "text", "Where downloaded weights and tokenizers are kept."),
    _on("lock-image", "switch", "Freeze the image tower."),
    _on("lock-image-unlocked-groups", "integer", "Last groups of the image tower that stay trainable."),
    _on("lock-image-freeze-bn-stats", "switch", "Freeze the batch norm statistics of locked layers as well."),
    _on("lock-text", "switch", "Freeze the text tower."),
    _on("lock-text-unlocked-layers", "integer", "Last groups of the text tower that stay trainable."),
    _on("lock-text-freeze-layer-norm", "switch", "Freeze the layer norms of locked layers as well."),
    _on("force-context-length", "integer", "Text tokens, instead of the model's own number."),
    _on("force-image-size", "integers", "Image size, or height and width, instead of the model's own."),
    _on("force-quick-gelu", "switch", "Use the QuickGELU activation, as OpenAI's weights need it."),
    _on("force-patch-dropout", "number", "Share of patches dropped in training, instead of the model's own."),
    _on("force-custom-text", "switch", "Build the text tower as a module of its own (CustomTextCLIP)."),
    _refused("use-bnb-linear", "text", None, "int8 layers are not supported. Use --precision amp_bf16"),
    _refused("pretrained-audio", "text", None, _NO_AUDIO, origin="HEAD"),
    _refused("use-naflex", "switch", False, _NO_NAFLEX, origin="HEAD"),
    _refused("force-naflex-vision", "switch", False, _NO_NAFLEX, origin="HEAD"),
    # loss
    _on("local-loss", "switch", "No effect: the loss is local either way, with the gradient of the global batch."),
    _on("gather-with-grad", "switch", "No effect: texts are gathered with their gradient either way."),
    _on("siglip", "switch", "Pairwise sigmoid loss, with its initial scale and bias."),
    _on(
        "loss-dist-impl",
        "text",
        "No effect: all ways give the same loss, which gathers the texts of all ranks once.",
        choices=("bidir", "shift", "reduce", "gather"),
    ),
    _on(
        "gather-dtype",
        "text",
        "Type in which text features are gathered; bf16 halves the bytes and rounds them.",
        origin="Clipyard",
        choices=("fp32", "bf16"),
    ),
    _no_effect("coca-caption-loss-weight", "number", 2.0, _NO_COCA),
    _no_effect("coca-contrastive-loss-weight", "number", 1.0, _NO_COCA),
    _refused("distill-model", "text", None, _NO_DISTILLATION),
    _refused("distill-pretrained", "text", None, _NO_DISTILLATION),
    # optim
    _on("opt", "text", "adamw, stableadamw, nadamw or timm/NAME."),
    _on("lr", "number", "Peak learning rate; 5e-4 unless the optimizer is timm's."),
    _on("beta1", "number", "First Adam momentum; 0.9 unless the optimizer is timm's."),
    _on("beta2", "number", "Second Adam momentum; 0.98 with `vit` in the model's name, else 0.999; not for timm's."),
    _on("eps", "number", "Adam's epsilon; 1e-6 with `vit` in the model's name, else 1e-8; not for timm's."),
    _on("wd", "number", "Weight decay, decoupled."),
    _on("momentum", "number", "Momentum of a timm optimizer."),
    _on("opt-kwargs", "pairs", "More arguments of the optimizer, as key=value.", origin="HEAD"),
    _on("wd-exclude", "texts", "Name patterns of parameters without weight decay.", origin="HEAD"),
    _on("grad-clip-norm", "number", "Largest L2 norm of all gradients together; none does not clip."),
    _refused(
        "opt-fallback-list",
        "texts",
        None,
        "parameters are not split between two optimizers. Use --opt timm/NAME alone, or --wd-exclude for weight decay",
        origin="HEAD",
    ),
    _refused("text-layer-decay", "number", None, _NO_LAYER_DECAY, origin="HEAD"),
    _refused("image-layer-decay", "number", None, _NO_LAYER_DECAY, origin="HEAD", aliases=("visual-layer-decay",)),
    _refused("audio-layer-decay", "number", None, _NO_AUDIO, origin="HEAD"),
    _no_effect(
        "text-pooler-own-group",
        "switch",
        False,
        "it only groups parameters for learning rates per layer, which are not supported",
        origin="HEAD",
    ),
    # schedule
    _on("epochs", "integer", "Epochs of --train-num-samples samples."),
    _on("epochs-cooldown", "integer", "Epochs of the cool-down of const-cooldown, at the end."),
    _on("warmup", "integer", "Optimizer steps of linear warm-up."),
    _on("skip-scheduler", "switch", "Keep the learning rate constant, without warm-up."),
    _on(
        "lr-scheduler",
        "text",
        "Course of the learning rate after warm-up.",
        choices=("cosine", "const", "const-cooldown"),
    ),
    _on("lr-cooldown-end", "number", "Learning rate at the end of the cool-down."),
    _on("lr-cooldown-power", "number", "Power of the cool-down's polynomial; 1 is linear."),
    _on(
        "phases",
        "text",
        "YAML file of phases: image size, patch dropout, text length, batch size, augmentation by samples seen.",
        origin="Clipyard",
    ),
    # engine
    _on("device", "text", "cuda, cpu or another accelerator; cuda falls back to cpu with a warning."),
    _on("dist-url", "text", "Where processes meet; env:// unless given."),
    _on("dist-backend", "text", "Backend of the process group; nccl on cuda and gloo on cpu unless given."),
    _on(
        "slurm-host-suffix",
        "text",
        "Added to the first host's name under srun without MASTER_ADDR; auto: i on the JSC machines, else nothing.",
        origin="Clipyard",
    ),
    _on("no-set-device-rank", "switch", "Do not choose the device by local rank (one visible device per process)."),
    _on("ddp-static-graph", "switch", "Tell DDP that the graph never changes."),
    _on("use-bn-sync", "switch", "Batch norm statistics over all ranks."),
    _on(
        "precision",
        "text",
        "Number formats of parameters and computation.",
        choices=PRECISION_CHOICES,
    ),
    _on("accum-freq", "integer", "Micro-steps per optimizer step; the loss sees all of their samples."),
    _on(
        "text-packing",
        "text",
        "auto: captions are computed without padding, with the same features, where the text tower allows it.",
        origin="Clipyard",
        choices=("auto", "off"),
    ),
    _on(
        "attention-kernel",
        "text",
        "Kernel of attention over images and padded texts; auto: PyTorch's choice, fastest: measured at the start.",
        origin="Clipyard",
        choices=("auto", "flash", "cudnn", "efficient", "math", "fastest"),
    ),
    _on(
        "channels-last",
        "text",
        "NHWC order for convolutional image towers; auto: on a GPU.",
        origin="Clipyard",
        choices=("auto", "on", "off"),
    ),
    _on(
        "fp8",
        "text",
        "Scaling of the blocks' linear layers to fp8 (torchao, GPUs since Ada): faster for wide models, other numbers.",
        origin="Clipyard",
        choices=("off", "tensorwise", "rowwise"),
    ),
    _on("grad-checkpointing", "switch", "Recompute blocks in the backward pass to save memory."),
    _on(
        "grad-checkpointing-policy",
        "text",
        "full: keep the inputs of blocks; selective: also results of products and attention.",
        origin="Clipyard",
        choices=("full", "selective"),
    ),
    _on(
        "grad-reduce-dtype",
        "text",
        "Type in which gradients are summed over ranks; bf16 halves the bytes, rounds, and is refused above 64 ranks.",
        origin="Clipyard",
        choices=("fp32", "bf16"),
    ),
    _on(
        "gc-every-n-steps",
        "integer",
        "Steps between Python's garbage collections, the same on all ranks; 0 leaves it to Python.",
        origin="Clipyard",
    ),
    _on("torchcompile", "switch", "Compile the model with torch.compile."),
    _on(
        "torchcompile-strategy",
        "text",
        "What is compiled at once; task and step do as model.",
        origin="HEAD",
        choices=("block", "model", "task", "step"),
    ),
    _on("torchcompile-backend", "text", "Backend of torch.compile.", origin="HEAD"),
    _on("torchcompile-mode", "text", "Mode of torch.compile; reduce-overhead adds CUDA graphs.", origin="HEAD"),
    _on("seed", "integer", "Every random number of the run follows from it."),
    _refused("horovod", "switch", False, "Horovod is not supported. Start with torchrun or srun, without this flag"),
    _refused("torchscript", "switch", False, "TorchScript is not supported. Use --torchcompile"),
    _refused(
        "trace", "switch", False, "tracing is not supported. Use --torchcompile, or leave out --train-data to evaluate"
    ),
    _on("fsdp", "switch", "Shard weights, gradients and optimizer state over the ranks (FSDP2).", origin="HEAD"),
    _on(
        "fsdp-shard-ranks",
        "integer",
        "Neighbouring ranks that share one copy, such as those of a node (HSDP); 0: all ranks.",
        origin="Clipyard",
    ),
    _on(
        "fsdp-no-reshard-after-forward",
        "switch",
        "Keep a block's weights gathered until its backward pass: more memory, less communication.",
        origin="HEAD",
    ),
    _on("fsdp-offload-cpu", "switch", "Keep shards and the optimizer in host memory.", origin="HEAD"),
    _on(
        "fsdp-checkpoint",
        "text",
        "full: also write epoch_N.pt; sharded: step checkpoints only.",
        origin="HEAD",
        choices=("full", "sharded"),
    ),
    # checkpoint
    _on("resume", "text", "latest, or a checkpoint to continue from (ours or OpenCLIP's)."),
    _on("save-frequency", "integer", "Epochs between epoch_N.pt files; 0 writes the last one only."),
    _on("save-most-recent", "switch", "Also write epoch_latest.pt after every epoch."),
    _on(
        "save-every-n-steps",
        "integer",
        "Optimizer steps between checkpoints within an epoch; 0 saves at the ends of epochs only.",
        origin="Clipyard",
    ),
    _on(
        "save-every-n-minutes",
        "number",
        "Minutes between checkpoints, by the clock of rank 0; 0 is never.",
        origin="Clipyard",
    ),
    _on("keep-checkpoints", "integer", "Newest step checkpoints kept on disk, at least 2.", origin="Clipyard"),
    _on("keep-every-n-steps", "integer", "Checkpoints at multiples of this step are kept for good.", origin="Clipyard"),
    _on("keep-best", "text", "Metric of the evaluation whose best checkpoint is kept.", origin="Clipyard"),
    _on("max-save-failures", "integer", "Saves in a row that may fail before the run ends.", origin="Clipyard"),
    _on("delete-previous-checkpoint", "switch", "Delete the previous epoch_N.pt once the next is written."),
    _on(
        "allow-restart-from-zero",
        "switch",
        "Start from the beginning although there are checkpoints, none of which can be used.",
        origin="Clipyard",
    ),
    _on(
        "allow-config-change",
        "texts",
        "Settings that may differ from those of the checkpoint, beside the ones that always may.",
        origin="Clipyard",
    ),
    _on("branch-from", "text", "RUN@STEP: start this run from a checkpoint of another one.", origin="Clipyard"),
    _on("remote-sync", "text", "URL that the run directory is mirrored to, and resumed from if it is gone."),
    _on("remote-sync-frequency", "integer", "Seconds between two rounds of mirroring."),
    _on(
        "remote-sync-protocol",
        "text",
        "s3: the built-in client; fsspec: any URL that fsspec knows.",
        choices=("s3", "fsspec"),
    ),
    # resilience
    _on(
        "guard",
        "text",
        "on: steps with a bad loss or gradient change nothing, on no rank; off: they are only counted.",
        choices=("on", "off"),
        origin="Clipyard",
    ),
    _on("guard-loss-z", "number", "Standard deviations above its mean that make a loss bad.", origin="Clipyard"),
    _on("guard-grad-z", "number", "The same for the logarithm of the gradient norm.", origin="Clipyard"),
    _on("guard-warmup", "integer", "Good steps before these statistics are trusted.", origin="Clipyard"),
    _on("guard-damp-steps", "integer", "Steps with lowered lr and beta2 after repeated bad steps.", origin="Clipyard"),
    _on("guard-damp-lr", "number", "What the learning rate is multiplied with meanwhile.", origin="Clipyard"),
    _on("guard-damp-beta2", "number", "Adam's beta2 meanwhile.", origin="Clipyard"),
    _on("guard-skip-steps", "integer", "Steps' worth of data left out when a spike is rewound.", origin="Clipyard"),
    _on("guard-max-rewinds", "integer", "Rewinds without progress before the run stops.", origin="Clipyard"),
    _on(
        "telemetry-every-n-steps",
        "integer",
        "Steps between measurements of updates, gradients and activations by layer; 0 is never.",
        origin="Clipyard",
    ),
    _on(
        "checksum-every-n-steps",
        "integer",
        "Steps between comparisons of the ranks' parameters; 0 is never.",
        origin="Clipyard",
    ),
    _on(
        "on-divergence",
        "text",
        "What follows when they differ: stop the run, or rewind it to a checkpoint from before.",
        choices=("stop", "rewind"),
        origin="Clipyard",
    ),
    _on("timeout-start", "number", "Seconds without progress that count as a hang at first.", origin="Clipyard"),
    _on("timeout-step", "number", "The same for every later step.", origin="Clipyard"),
    _on("timeout-evaluation", "number", "The same for an evaluation, a save or a rewind.", origin="Clipyard"),
    _on(
        "timeout-heartbeat",
        "number",
        "Seconds a process may be without a sign of life before it is ended; 0 starts no monitor.",
        origin="Clipyard",
    ),
    _on(
        "take-over",
        "switch",
        "Take the run directory from a job that cannot be seen to have ended.",
        origin="Clipyard",
    ),
    # evaluation
    _on("imagenet-val", "text", "Folder with one folder of images per ImageNet class, for zero-shot."),
    _on("imagenet-v2", "text", "ImageNet-V2: a folder with class folders 0 to 999, as its package unpacks it."),
    _on(
        "zeroshot-data",
        "text",
        "Webdataset evaluation sets (class names and templates beside the tars), joined with `::`.",
        origin="Clipyard",
    ),
    _on(
        "retrieval-data",
        "text",
        "Webdataset retrieval sets (several captions per image, one per line), joined with `::`.",
        origin="Clipyard",
    ),
    _on("zeroshot-frequency", "integer", "Epochs between zero-shot evaluations; 0 is never."),
    _on("val-frequency", "integer", "Epochs between evaluations on --val-data; 0 is never."),
    _on(
        "val-retrieval-chunk-size",
        "integer",
        "Rows of the score matrix ranked at a time; 0 ranks all at once.",
        origin="HEAD",
    ),
    _no_effect(
        "val-retrieval-precision",
        "text",
        "fp32",
        "retrieval scores are always computed in fp32, the more exact of the two",
        origin="HEAD",
        choices=("fp32", "model"),
    ),
    _on("evaluate-at-start", "switch", "Also evaluate before the first step.", origin="Clipyard"),
    # logging
    _on("logs", "text", "Directory of the run directories; none writes neither logs nor checkpoints."),
    _on("name", "text", "Name of the run and of its directory; else date, model, lr, batch size, workers, precision."),
    _on("log-local", "switch", "The first process of every node writes its own out-RANK log."),
    _on("report-to", "text", "Where metrics go besides files: tensorboard, wandb, or all for both."),
    _on("wandb-notes", "text", "Notes of the run on wandb."),
    _on("wandb-project-name", "text", "Project of the run on wandb."),
    _on("debug", "switch", "Log more."),
    _on("copy-codebase", "switch", "Copy the code into the run directory."),
    _on("log-every-n-steps", "integer", "Optimizer steps between lines on the console."),
    _on("log-metric-every-n-steps", "integer", "Optimizer steps between points of the metrics.", origin="HEAD"),
    _no_effect(
        "train-loss-ema-samples",
        "integer",
        50_000,
        "the console shows the mean of the loss since the last line instead of a moving average",
        origin="HEAD",
    ),
    # audio
    _refused("audio-ext", "text", "flac", _NO_AUDIO, origin="HEAD"),
    _refused("audio-fill", "text", "repeatpad", _NO_AUDIO, origin="HEAD", choices=("pad", "repeat", "repeatpad")),
    _refused("audio-trunc", "text", "rand_trunc", _NO_AUDIO, origin="HEAD", choices=("rand_trunc", "trunc", "fusion")),
    _refused("audio-fusion", "switch", False, _NO_AUDIO, origin="HEAD"),
    _refused("audio-int16-normalize", "switch", False, _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-dataset", "text", None, _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-split", "text", "train", _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-audio-key", "text", "audio", _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-target-key", "text", "target", _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-class-key", "text", "category", _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-template", "text", None, _NO_AUDIO, origin="HEAD"),
    _refused("audio-zeroshot-workers", "integer", 0, _NO_AUDIO, origin="HEAD"),
    _refused(
        "audio-zeroshot-multiprocessing-context",
        "text",
        "forkserver",
        _NO_AUDIO,
        origin="HEAD",
        choices=("fork", "forkserver", "spawn"),
    ),
    _refused(
        "audio-multiprocessing-context",
        "text",
        "forkserver",
        _NO_AUDIO,
        origin="HEAD",
        choices=("fork", "forkserver", "spawn"),
    ),
    # variable image sizes
    _refused("naflex-num-train-image-tokens", "integer", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-patch-sizes", "integers", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-patch-size-probs", "numbers", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-seq-lens", "integers", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-seq-len-probs", "numbers", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-max-tokens-per-batch", "integer", 16_384, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-max-text-tokens", "integer", None, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-batch-divisor", "integer", 8, _NO_NAFLEX, origin="HEAD"),
    _refused("naflex-loss-scale", "text", "none", _NO_NAFLEX, origin="HEAD", choices=("none", "linear", "sqrt")),
    _refused("naflex-pad-multiple", "integer", None, _NO_NAFLEX, origin="HEAD"),
)

CONFIG_FILE_OPTION = "--config"
"""The one option that is no setting: a YAML file of settings. It is in no section, so it is not in the table."""

BY_FIELD: Mapping[str, Flag] = MappingProxyType({flag.field_name: flag for flag in FLAGS})
BY_OPTION: Mapping[str, Flag] = MappingProxyType(
    {f"--{name}": flag for flag in FLAGS for name in (flag.name, *flag.aliases)}
)

SECTION_OF_FIELD: Mapping[str, str] = MappingProxyType(
    {setting.name: section.name for section in fields(Config) for setting in fields(getattr(Config(), section.name))}
)


DEFAULTS = Config()


def setting_of(config: Config, flag: Flag) -> Any:
    """The value of a supported flag in a configuration."""
    return getattr(getattr(config, SECTION_OF_FIELD[flag.field_name]), flag.field_name)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`` (nearest: X)`` for an error about a word nobody knows, or nothing where nothing is near."""
    # Dashes are alike in all flags; compared, they would make any two of them near.
    by_text = {candidate.lstrip("-"): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word.lstrip("-"), by_text, n=1)
    return f" (nearest: {by_text[matches[0]]})" if matches else ""


def render_flag_table() -> str:
    """The table as Markdown, for docs/openclip_compatibility.md."""
    lines = ["| Flag | From | Verdict | Default | What it does, or why not |", "|---|---|---|---|---|"]
    for flag in FLAGS:
        names = ", ".join(f"`--{name}`" for name in (flag.name, *flag.aliases))
        choices = f" One of {', '.join(flag.choices)}." if flag.choices else ""
        note = flag.note if flag.note.endswith(".") else f"{flag.note[0].upper()}{flag.note[1:]}."
        default = setting_of(DEFAULTS, flag) if flag.verdict is Verdict.SUPPORTED else flag.off
        lines.append(f"| {names} | {flag.origin} | {flag.verdict.value} | {_cell(default)} | {note}{choices} |")
    return "\n".join(lines)


def _cell(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{list(default) if isinstance(default, tuple) else default!r}`"
