"""Builds a tiny model and a train step on a device, from the parts that a run is built from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import ClipConfig
from models.factory import create_model
from training.config import LossConfig, OptimConfig
from training.data.batch import DeviceBatch
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision, cast_parameters
from training.train_step import TrainStep

MODEL = "demo-vit"


def build_model(device: torch.device, *, seed: int = 0) -> tuple[nn.Module, ClipConfig]:
    """The demo model; the same seed gives the same weights on every device."""
    torch.manual_seed(seed)
    built = create_model(MODEL, device="cpu")
    return built.model.to(device).train(), built.config


def build_batch(config: ClipConfig, size: int, device: torch.device, *, seed: int = 0) -> DeviceBatch:
    """Normalised noise and random captions of one length, drawn on the CPU so that devices can be compared."""
    generator = torch.Generator().manual_seed(seed)
    pixels = config.vision_cfg.image_hw
    images = torch.randn(size, 3, *pixels, generator=generator)
    texts = torch.randint(1, 49_000, (size, config.text_cfg.context_length), generator=generator)
    texts[:, 10:] = 0
    texts[:, 10] = 49_407
    return DeviceBatch(images.to(device), texts.to(device))


def build_step(
    model: nn.Module,
    device: torch.device,
    *,
    precision: str,
    trained: nn.Module | None = None,
    clip: float | None = None,
) -> TrainStep:
    """The step of a run; ``trained`` is the wrapper (DDP) around ``model`` if there is one."""
    row = build_precision(precision, device)
    cast_parameters(model, row)
    return TrainStep(
        model=trained if trained is not None else model,
        loss=build_loss(LossConfig()),
        optimizer=build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6)),
        precision=row,
        grad_clip_norm=clip,
    )


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector on the CPU."""
    return torch.cat([parameter.detach().float().flatten().cpu() for parameter in model.parameters()])
