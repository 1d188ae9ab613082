"""A batch on its way from the loader to the device: uint8 images until it is there, normalised floats from then on.

Legend: B rank batch, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What the loader yields. Images stay uint8: a quarter of the bytes to pin and to copy."""

    images: Tensor
    """uint8 [B, 3, H, W]"""
    texts: Tensor
    """int64 [B, L]"""
    position: Any
    """Where the loader stands after this batch: opaque and picklable; the trainer commits it with the step."""
    skipped: Mapping[str, int]
    """Samples left out since the batch before, by reason."""


class DeviceBatch(NamedTuple):
    """What the step consumes."""

    images: Tensor
    """float [B, 3, H, W], normalised, in the precision's input dtype"""
    texts: Tensor
    """int64 [B, L]"""


def to_device(
    batch: Batch, *, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype
) -> DeviceBatch:
    """Copies a batch to the device and normalises it there. Does not wait for the copy if the batch is pinned."""
    images = batch.images.to(device, non_blocking=True)
    texts = batch.texts.to(device, non_blocking=True)
    return DeviceBatch(normalize(images, mean=mean, std=std, dtype=dtype), texts)


def normalize(
    images: Tensor, *, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 [B, 3, H, W] -> dtype [B, 3, H, W], on the images' device.

    The same operations in the same order as torchvision's ToTensor and Normalize, so the same bits in fp32.
    """
    center, spread = _channel_constants(tuple(mean), tuple(std), images.device)
    normalized = images.to(torch.float32, copy=True)
    return normalized.div_(255).sub_(center).div_(spread).to(dtype)


@lru_cache(maxsize=8)
def _channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each. Cached, because making a tensor on a GPU from Python numbers makes the host wait."""
    center, spread = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
    return center[:, None, None], spread[:, None, None]
