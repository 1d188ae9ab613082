"""A batch on its way from the loader to the device: uint8 images until it is there, normalised floats from then on.

Texts stay int64 [B, L], or lose their padding on the host, where their lengths can be looked at without waiting.

Legend: B rank batch, L text tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.packing import PackedTexts
from training.data.lane_reader import Fault
from training.data.lanes import LanePosition

SAMPLE_COLUMNS = ("slot", "raw_index", "source")


class BatchBuffers(NamedTuple):
    """Where the loader writes a batch."""

    images: Tensor
    """uint8 [B, 3, H, W]: a quarter of the bytes of floats, to share and to copy."""
    texts: Tensor
    """int64 [B, L]"""
    samples: Tensor
    """int64 [B, 3]: ``SAMPLE_COLUMNS`` of every row."""


@dataclass(frozen=True)
class BatchRecord:
    """What a batch means for the loader: small, and needed until the trainer commits it."""

    positions: Mapping[int, LanePosition]
    """By index into the rank's lanes: where they stand after this batch."""
    samples: Tensor
    """int64 [B, 3]"""
    counts: Counter[str]
    bad_shards: Counter[str]
    faults: Sequence[Fault] = field(default_factory=list)


class Batch(NamedTuple):
    """What the loader yields. The tensors may be its own memory: good until the next batch is asked for."""

    images: Tensor
    """uint8 [B, 3, H, W]"""
    texts: Tensor
    """int64 [B, L]"""
    record: BatchRecord


class DeviceBatch(NamedTuple):
    """What the step consumes."""

    images: Tensor
    """float [B, 3, H, W], normalised, in the precision's input dtype"""
    texts: Tensor | PackedTexts
    """int64 [B, L], or packed"""
    record: BatchRecord | None = None
    sources: Tensor | None = None
    """int64 [B]: which source each row came from."""


def to_device(
    batch: Batch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    pack: Callable[[Tensor], Tensor | PackedTexts] = Tensor.clone,
) -> DeviceBatch:
    """Copies a batch to the device and normalises it there; the result shares no memory with the batch.

    Does not wait for the copy of images if the batch is pinned.

    Args:
        pack: what becomes of the texts on the host, in new memory (``models/text_form.py``).
    """
    images = batch.images.to(device, non_blocking=True)
    texts = pack(batch.texts).to(device, non_blocking=True)
    sources = batch.record.samples[:, SAMPLE_COLUMNS.index("source")].to(device, non_blocking=True)
    return DeviceBatch(normalize(images, mean=mean, std=std, dtype=dtype), texts, batch.record, sources)


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
