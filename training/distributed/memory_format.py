"""Which image towers compute on NHWC memory (torch.channels_last), as the fastest convolutions of GPUs want it.

Shapes, names and values stay: only the order of a weight's numbers in memory changes. Checkpoints hold NCHW.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn

logger = logging.getLogger(__name__)


def image_memory_format(model: nn.Module, setting: str, *, device: torch.device) -> torch.memory_format:
    """What images should come in. Pure.

    Args:
        setting: --channels-last: auto, on or off; auto is on for convolutional towers on a GPU.
    """
    wanted = setting == "on" or (setting == "auto" and device.type == "cuda")
    return torch.channels_last if wanted and is_convolutional(model) else torch.contiguous_format


def is_convolutional(model: nn.Module) -> bool:
    """Whether the image tower has convolutions beyond cutting an image into patches, whose windows do not overlap."""
    tower = getattr(model, "visual", None)
    return tower is not None and any(
        isinstance(module, nn.Conv2d) and module.kernel_size != module.stride for module in tower.modules()
    )


def apply_memory_format(model: nn.Module, setting: str, *, device: torch.device, is_sharded: bool) -> None:
    """Reorders the weights of an image tower in place, and says so.

    Args:
        is_sharded: FSDP takes weights in their usual order only: each convolution then reorders its own.
    """
    if image_memory_format(model, setting, device=device) is not torch.channels_last:
        if setting == "on":
            logger.info(
                "--channels-last on has no effect: the image tower has no convolutions but those of its patches."
            )
        return
    if not is_sharded:
        cast(nn.Module, model.visual).to(memory_format=torch.channels_last)
    logger.info("Image tower: NHWC memory%s.", " for images, not for weights, because of FSDP" if is_sharded else "")
