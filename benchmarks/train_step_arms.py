"""The two sides of the train-step benchmark: our step, and OpenCLIP's model, loss and step semantics.

Legend: B batch, L text tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import configs
from models.factory import create_model
from training.config import EngineConfig, LossConfig, OptimConfig
from training.data.batch import DeviceBatch
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision, cast_parameters
from training.train_step import TrainStep


@dataclass(frozen=True)
class ArmSettings:
    """What both sides have in common, and how each is tuned."""

    model: str
    precision: str
    device: torch.device
    grad_checkpointing: bool = False
    torchcompile: bool = False
    """Compile our blocks."""
    tune_open_clip: bool = False
    """OpenCLIP at its best: the whole model compiled, and AdamW's fused kernel."""
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2


class StepArm(Protocol):
    """A model with its optimizer, and one optimizer step of it."""

    name: str
    model: nn.Module
    input_dtype: torch.dtype
    """What the images must be when ``step`` gets them."""

    def step(self, batch: DeviceBatch) -> Tensor:
        """One optimizer step; the loss stays on the device."""

    def loss(self, batch: DeviceBatch) -> Tensor:
        """The loss in full precision with its graph; no step."""


class ClipyardArm:
    """Our own step, built by the functions that a run uses."""

    name = "clipyard"

    def __init__(self, settings: ArmSettings) -> None:
        device = settings.device
        engine = EngineConfig(
            device=str(device),
            precision=settings.precision,
            grad_checkpointing=settings.grad_checkpointing,
            torchcompile=settings.torchcompile,
        )
        optim = OptimConfig(
            lr=settings.lr,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            eps=settings.eps,
            wd=settings.weight_decay,
        )
        self.model: nn.Module = create_model(settings.model, device=str(device)).model
        precision = build_precision(settings.precision, device)
        cast_parameters(self.model, precision)
        self.input_dtype = precision.input_dtype
        self.model.train()
        self._lr = settings.lr
        self._loss = build_loss(LossConfig())
        runtime = Runtime(rank=0, local_rank=0, world_size=1, device=device)
        self._step = TrainStep(
            model=parallelize(self.model, config=engine, runtime=runtime),
            loss=self._loss,
            optimizer=build_optimizer(self.model, optim),
            precision=precision,
        )

    def step(self, batch: DeviceBatch) -> Tensor:
        return self._step([batch], lr=self._lr).loss

    def loss(self, batch: DeviceBatch) -> Tensor:
        out = self.model(batch.images, batch.texts)
        return self._loss(out.image_features, out.text_features, out.logit_scale, out.logit_bias)


class OpenClipArm:
    """OpenCLIP's model and loss, stepped in the order in which its trainer does it."""

    name = "open_clip"

    def __init__(self, settings: ArmSettings) -> None:
        import open_clip

        # Our own configurations by name, as well as OpenCLIP's.
        open_clip.add_model_config(Path(configs.__file__).parent / "models")
        self._precision = settings.precision
        self._device = settings.device
        self.model: nn.Module = open_clip.create_model(
            settings.model, precision=settings.precision, device=settings.device, output_dict=True
        )
        self.model.train()
        if settings.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self._loss = open_clip.ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True)
        self.input_dtype = torch.bfloat16 if settings.precision in ("bf16", "pure_bf16") else torch.float32
        self._optimizer = self._build_optimizer(settings)
        tuned = settings.tune_open_clip
        self._forward: Callable[..., Mapping[str, Tensor]] = torch.compile(self.model) if tuned else self.model

    def _build_optimizer(self, settings: ArmSettings) -> torch.optim.Optimizer:
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
            fused=True if settings.tune_open_clip else None,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision not in ("amp_bf16", "amp_bfloat16"):
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def step(self, batch: DeviceBatch) -> Tensor:
        self._optimizer.zero_grad()
        with self._autocast():
            total: Tensor = self._loss(**self._forward(batch.images, batch.texts), output_dict=True)["contrastive_loss"]
        total.backward()
        self._optimizer.step()
        with torch.no_grad():
            scale: Tensor = self.model.get_parameter("logit_scale")
            scale.clamp_(0, math.log(100))
        return total.detach()

    def loss(self, batch: DeviceBatch) -> Tensor:
        loss: Tensor = self._loss(**self.model(batch.images, batch.texts))
        return loss


ARMS: dict[str, Callable[[ArmSettings], StepArm]] = {ClipyardArm.name: ClipyardArm, OpenClipArm.name: OpenClipArm}


def use_open_clip_checkout(path: Path) -> None:
    """Import open_clip from a checkout instead of the installed one; both layouts (``src/`` or flat) are found."""
    for folder in (path / "src", path):
        if (folder / "open_clip" / "__init__.py").exists():
            sys.path.insert(0, str(folder))
            return
    raise ValueError(f"no open_clip package under {path}: pass --open-clip-path CHECKOUT, the root of its repository")
