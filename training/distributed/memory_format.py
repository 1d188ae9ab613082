"""Which image towers compute on NHWC memory (torch.channels_last), as the fastest convolutions of GPUs want it.

Shapes, names and values stay: only the order of a weight's numbers in memory changes. Checkpoints hold NCHW.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_MARK = "images_are_channels_last"
"""Attribute of an image tower that ``apply_channels_last`` was called on."""


def wants_channels_last(model: nn.Module, setting: str, *, device_type: str) -> bool:
    """What --channels-last means for a model: ``auto`` is on for convolutional image towers on a GPU. Pure."""
    return (setting == "on" or (setting == "auto" and device_type == "cuda")) and is_convolutional(model)


def is_convolutional(model: nn.Module) -> bool:
    """Whether the image tower has convolutions beyond cutting an image into patches, whose windows do not overlap."""
    return any(module.kernel_size != module.stride for module in _convolutions(model))


def apply_channels_last(model: nn.Module, *, is_sharded: bool) -> None:
    """Reorders the image tower's weights in place, and whatever images it is given.

    Args:
        is_sharded: FSDP takes weights in their usual order only; each convolution then reorders its own.
    """
    visual = cast(nn.Module, model.visual)
    if not is_sharded:
        visual.to(memory_format=torch.channels_last)
    # Those of an evaluation; images of training come in this order (``image_memory_format``), which costs nothing here.
    visual.register_forward_pre_hook(_reorder)
    setattr(visual, _MARK, True)


def image_memory_format(model: nn.Module) -> torch.memory_format:
    """The order in which the image tower wants images; ``preserve_format`` if it does not care."""
    # Weights do not tell: those that FSDP shards have no order of their own.
    is_reordered = getattr(getattr(model, "visual", None), _MARK, False)
    return torch.channels_last if is_reordered else torch.preserve_format


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    tower = getattr(model, "visual", None)
    return [] if tower is None else [module for module in tower.modules() if isinstance(module, nn.Conv2d)]


def _reorder(module: nn.Module, inputs: tuple[Tensor, *tuple[Any, ...]]) -> tuple[Any, ...]:
    images, *others = inputs
    return images.contiguous(memory_format=torch.channels_last), *others
