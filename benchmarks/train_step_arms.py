"""The two sides of the train-step benchmark: our step as a run builds it, and OpenCLIP's model, loss and step order.

    host batch --prepare--> device batch --step--> loss
                ours: packed captions              both: forward, loss, backward, AdamW, clamp
                OpenCLIP's: padded ones

Legend: B batch, L text tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import configs
from benchmarks.batches import HostBatch
from benchmarks.gradient_error import Pass, exact_pass, take_gradients
from models.factory import create_model
from training.assembly import build_device_loading, build_trained_model, choose_attention
from training.cli import parse
from training.config import Config
from training.data.batch import SAMPLE_COLUMNS, Batch, BatchRecord, DeviceBatch, normalize
from training.distributed.collectives import all_reduce_sum
from training.distributed.runtime import Runtime
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience.guard import VITALS, StepGuard
from training.train_step import TrainStep


@dataclass(frozen=True)
class ArmSettings:
    """What both sides have in common."""

    model: str
    """A name, or the path of a model's .json."""
    precision: str
    device: torch.device
    grad_checkpointing: bool = False
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2

    def as_run(self, flags: Sequence[str] = ()) -> Config:
        """The configuration of a run with these settings and further flags, checked as a run's is."""
        words = [
            *(f"--model={self.model}", f"--precision={self.precision}", f"--device={self.device.type}"),
            *("--dataset-type=synthetic", "--train-num-samples=1000000"),
            *(f"--lr={self.lr}", f"--beta1={self.betas[0]}", f"--beta2={self.betas[1]}"),
            *(f"--eps={self.eps}", f"--wd={self.weight_decay}"),
            *(["--grad-checkpointing"] if self.grad_checkpointing else []),
        ]
        return parse([*words, *flags]).config


class Tuning(NamedTuple):
    """What OpenCLIP's user may switch on."""

    compiled: bool = False
    """The whole model, as its --torchcompile does, with AdamW's fused kernel: OpenCLIP at its best."""
    checkpointed: bool = False
    """Where its activations do not fit otherwise."""


class StepArm(Protocol):
    """A model with its optimizer, and one optimizer step of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def prepare(self, batches: Sequence[HostBatch]) -> list[DeviceBatch]:
        """The batches on the device, in the form in which ``step`` takes them."""

    def step(self, batch: DeviceBatch) -> Tensor:
        """One optimizer step; the loss stays on the device."""

    def loss(self, batch: DeviceBatch) -> Tensor:
        """The loss in full precision with its graph; no step."""

    def passed(self, batch: DeviceBatch) -> Pass:
        """Forward and backward pass of the very program that ``step`` times, without its update."""

    def skipped_steps(self) -> int:
        """How many steps changed nothing."""


def single_process(device: torch.device) -> Runtime:
    """This process alone."""
    return Runtime(rank=0, local_rank=0, world_size=1, device=device)


class ClipyardArm:
    """Our own step, built by the functions that a run uses, with its guard, on captions packed as a run packs them."""

    name = "clipyard"

    def __init__(self, settings: ArmSettings, *, flags: Sequence[str] = (), runtime: Runtime | None = None) -> None:
        """
        Args:
            flags: of a run, beyond the settings: --torchcompile and the like.
        """
        self.config = settings.as_run(flags)
        self._runtime = runtime = runtime or single_process(settings.device)
        self._precision = build_precision(settings.precision, runtime.device)
        with drawing_on(runtime.device):
            trained = build_trained_model(self.config, runtime=runtime, precision=self._precision)
        self.model: nn.Module = trained.built.model
        self._wrapped = trained.wrapped
        self.model.train()
        without_stochastic_depth(self.model)
        packing = self.config.engine.text_packing
        self._attention = _chosen_attention(self.config, runtime)
        self._load = build_device_loading(trained.built, self._precision, device=runtime.device, text_packing=packing)
        self.start()

    def start(self) -> None:
        """As at a run's first step: moments and what the guard knows are forgotten, weights stay as they are."""
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self._loss = build_loss(self.config.loss)
        self._step = TrainStep(
            model=self._wrapped,
            loss=self._loss,
            optimizer=self.optimizer,
            precision=self._precision,
            scaler=self._precision.grad_scaler(),
            grad_clip_norm=self.config.optim.grad_clip_norm,
            guard=StepGuard(
                self.config.resilience,
                device=self._runtime.device,
                rank=self._runtime.rank,
                world_size=self._runtime.world_size,
                all_reduce_sum=all_reduce_sum,
            ),
        )
        self._bad: list[Tensor] = []

    def prepare(self, batches: Sequence[HostBatch]) -> list[DeviceBatch]:
        return list(self._load(iter([as_loaded(batch) for batch in batches])))

    def step(self, batch: DeviceBatch) -> Tensor:
        with self._attention():
            metrics = self._step([batch], lr=float(self.config.optim.lr or 0))
        assert metrics.vitals is not None
        self._bad.append(metrics.vitals[VITALS.index("bad")])
        return metrics.loss

    def loss(self, batch: DeviceBatch) -> Tensor:
        out = self._wrapped(batch.images, batch.texts)
        return self._loss(out.image_features, out.text_features, out.logit_scale, out.logit_bias)

    def passed(self, batch: DeviceBatch) -> Pass:
        self.optimizer.zero_grad(set_to_none=True)
        with self._attention():
            _, (output,) = self._step.compute_gradients([batch])
        return Pass(output.image_features.detach(), output.text_features.detach(), take_gradients(self.model))

    def skipped_steps(self) -> int:
        return int(torch.stack(self._bad).sum().item()) if self._bad else 0  # host sync


class OpenClipArm:
    """OpenCLIP's model and loss, stepped in the order in which its trainer does it."""

    name = "open_clip"

    def __init__(self, settings: ArmSettings, *, tuning: Tuning | None = None, runtime: Runtime | None = None) -> None:
        import open_clip

        runtime, tuning = runtime or single_process(settings.device), tuning or Tuning()
        self._precision = settings.precision
        self._device = runtime.device
        with drawing_on(runtime.device):
            self.model: nn.Module = open_clip.create_model(
                _open_clip_name(settings.model),
                precision=settings.precision,
                device=runtime.device,
                output_dict=True,
            )
        self.model.train()
        without_stochastic_depth(self.model)
        if settings.grad_checkpointing or tuning.checkpointed:
            self.model.set_grad_checkpointing()
        self._preprocess = create_model(settings.model, device="meta").preprocess
        self._input_dtype = torch.bfloat16 if settings.precision in ("bf16", "pure_bf16") else torch.float32
        # Over several ranks as its recipes do; its default gives other gradients than those of the global batch.
        together = runtime.world_size > 1
        self._loss = open_clip.ClipLoss(
            local_loss=together,
            gather_with_grad=together,
            cache_labels=True,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        self.optimizer = self._build_optimizer(settings, fused=tuning.compiled)
        self._wrapped: Callable[..., Mapping[str, Tensor]] = self._wrap(runtime, static_graph=tuning.compiled)
        self._forward = torch.compile(self._wrapped) if tuning.compiled else self._wrapped

    def _wrap(self, runtime: Runtime, *, static_graph: bool) -> nn.Module:
        if runtime.world_size == 1:
            return self.model
        devices = [runtime.device.index] if runtime.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices, static_graph=static_graph)

    def _build_optimizer(self, settings: ArmSettings, *, fused: bool) -> torch.optim.Optimizer:
        """AdamW with two groups: gains and biases without weight decay, then the rest."""
        plain: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            undecayed = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (plain if undecayed else decayed).append(parameter)
        return torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=fused or None,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision not in ("amp_bf16", "amp_bfloat16"):
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def prepare(self, batches: Sequence[HostBatch]) -> list[DeviceBatch]:
        mean, std, dtype = self._preprocess.mean, self._preprocess.std, self._input_dtype
        return [
            DeviceBatch(
                normalize(batch.images.to(self._device), mean=mean, std=std, dtype=dtype),
                batch.texts.to(self._device),
            )
            for batch in batches
        ]

    def step(self, batch: DeviceBatch) -> Tensor:
        total, _ = self._backward(batch)
        self.optimizer.step()
        with torch.no_grad():
            scale: Tensor = self.model.get_parameter("logit_scale")
            scale.clamp_(0, math.log(100))
        return total.detach()

    def _backward(self, batch: DeviceBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.optimizer.zero_grad()
        with self._autocast():
            output = self._forward(batch.images, batch.texts)
            total: Tensor = self._loss(**output, output_dict=True)["contrastive_loss"]
        total.backward()
        return total, output

    def passed(self, batch: DeviceBatch) -> Pass:
        _, output = self._backward(batch)
        features = (output["image_features"].detach(), output["text_features"].detach())
        return Pass(*features, take_gradients(self.model))

    def exact(self, batch: DeviceBatch, *, dtype: torch.dtype = torch.float32) -> Pass:
        """The same pass as nobody trains it: eager, in full precision."""
        return exact_pass(self.model, batch, self._loss, dtype=dtype)

    def loss(self, batch: DeviceBatch) -> Tensor:
        loss: Tensor = self._loss(**self._wrapped(batch.images, batch.texts))
        return loss

    def skipped_steps(self) -> int:
        return 0


RIVALS: dict[str, Tuning] = {
    "open_clip": Tuning(),
    "open_clip_tuned": Tuning(compiled=True),
    "open_clip_checkpointed": Tuning(checkpointed=True),
}
"""OpenCLIP's arms: as its flags are by default, at its best, and as it is where memory is short."""


def _chosen_attention(config: Config, runtime: Runtime) -> Callable[[], AbstractContextManager[object]]:
    """What --attention-kernel sets for a whole process, for our steps only."""
    if config.engine.attention_kernel == "auto":
        return nullcontext
    with choose_attention(config, runtime):
        chosen = _cur_sdpa_kernel_backends(with_priority=True)
    return partial(sdpa_kernel, chosen, set_priority=True)


def as_loaded(batch: HostBatch) -> Batch:
    """As our loader yields it, with a record of nothing."""
    samples = torch.zeros(len(batch.images), len(SAMPLE_COLUMNS), dtype=torch.int64)
    return Batch(batch.images, batch.texts, BatchRecord({}, samples, Counter(), Counter()))


def without_stochastic_depth(model: nn.Module) -> None:
    """Off in both arms: they would leave out different blocks, and no loss could be compared."""
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            setattr(module, "drop_prob", 0.0)  # noqa: B010 - timm's, unknown to nn.Module


class drawing_on(TorchFunctionMode):  # noqa: N801 - used as a function
    """Fills large tensors with random numbers on a device, which takes a CPU some ten seconds per billion."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_draw = func in (Tensor.normal_, Tensor.uniform_) and kwargs.get("generator") is None
        if not is_draw or args[0].device.type != "cpu" or args[0].numel() < 2**16:
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        drawn = func(torch.empty_like(args[0], device=self._device), *args[1:], **kwargs)
        return args[0].copy_(drawn)


def _open_clip_name(model: str) -> str:
    """OpenCLIP takes names only; our own configurations, and a file, become known to it by theirs."""
    import open_clip

    path = Path(model)
    open_clip.add_model_config(path if path.suffix == ".json" else Path(configs.__file__).parent / "models")
    return path.stem if path.suffix == ".json" else model
