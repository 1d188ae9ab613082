"""A batch on its way from the loader to the device: uint8 images until it is there, normalised floats from then on.

Texts stay int64 [B, L], or lose their padding on the host, where their lengths can be looked at without waiting.

Legend: B rank batch, L text tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from time import perf_counter_ns
from typing import NamedTuple

import torch
from torch import Tensor

from models.packing import PackedTexts
from training.data.device_decode import decode_rows
from training.data.encoded_image import EncodedImage, EncodedRows
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
    encoded: EncodedRows | None = None
    """The same memory as ``images``, for rows that are decoded on the device."""

    def put_image(self, row: int, image: Tensor | EncodedImage) -> None:
        """Writes an image, decoded or not, into its row."""
        if isinstance(image, EncodedImage):
            assert self.encoded is not None
            self.encoded.put(row, image)
            return
        self.images[row].copy_(image)
        if self.encoded is not None:
            self.encoded.put_none(row)


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
    undecodable: Sequence[tuple[int, int]] = ()
    """(slot, raw index) of samples whose images only the device found to be broken."""

    @property
    def shows_nothing(self) -> bool:
        """Whether that befell all samples."""
        return 0 < len(self.samples) == len(self.undecodable)


class Batch(NamedTuple):
    """What the loader yields. The tensors may be its own memory: good until the next batch is asked for."""

    images: Tensor
    """uint8 [B, 3, H, W]"""
    texts: Tensor
    """int64 [B, L]"""
    record: BatchRecord
    encoded: EncodedRows | None = None
    """Of rows that are decoded on the device."""


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
    memory_format: torch.memory_format = torch.preserve_format,
) -> DeviceBatch:
    """Copies a batch to the device and normalises it there; the result shares no memory with the batch.

    Does not wait for the copy of images if the batch is pinned.

    Args:
        pack: what becomes of the texts on the host, in new memory (``models/text_form.py``).
        memory_format: of the images, as ``normalize`` has it.
    """
    if batch.encoded is None:
        images = batch.images.to(device, non_blocking=True)
    else:
        images, batch = _decode(batch, batch.encoded, device)
    texts = pack(batch.texts).to(device, non_blocking=True)
    sources = batch.record.samples[:, SAMPLE_COLUMNS.index("source")].to(device, non_blocking=True)
    normalized = normalize(images, mean=mean, std=std, dtype=dtype, memory_format=memory_format)
    return DeviceBatch(normalized, texts, batch.record, sources)


def _decode(batch: Batch, encoded: EncodedRows, device: torch.device) -> tuple[Tensor, Batch]:
    """(images on the device, batch without the samples that cannot be decoded).

    Such a sample's place is taken by another of the batch: where the stream stands was settled when its header and
    its end looked whole. It counts as skipped. In a batch without a single whole image nothing is put in its place:
    ``load_to_device`` does that, with the batch that follows.
    """
    start = perf_counter_ns()
    images, refused, broken = decode_rows(batch.images, encoded, device=device)
    counts = Counter({"decoded_on_host/refused": refused, "skipped/broken_image": len(broken)})
    counts["device_decode_us"] = (perf_counter_ns() - start) // 1000
    record = replace(batch.record, counts=batch.record.counts + counts)
    if not broken:
        return images, batch._replace(record=record)
    lost = [(slot, index) for slot, index, _ in record.samples[broken].tolist()]
    record = replace(record, undecodable=lost)
    whole = [row for row in range(len(images)) if row not in broken]
    if not whole:
        return images, batch._replace(record=record)
    others = [whole[place % len(whole)] for place in range(len(broken))]
    images[broken] = images[others]
    texts, samples = batch.texts.clone(), record.samples.clone()
    texts[broken], samples[broken] = texts[others], samples[others]
    return images, batch._replace(texts=texts, record=replace(record, samples=samples))


def normalize(
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """(x / 255 - mean) / std per channel: uint8 [B, 3, H, W] -> dtype [B, 3, H, W], on the images' device.

    The same operations in the same order as torchvision's ToTensor and Normalize, so the same bits in fp32.

    Args:
        memory_format: of the result; ``torch.channels_last`` costs nothing here, where pixels are copied anyway.
    """
    center, spread = _channel_constants(tuple(mean), tuple(std), images.device)
    normalized = images.to(torch.float32, copy=True, memory_format=memory_format)
    return normalized.div_(255).sub_(center).div_(spread).to(dtype)


@lru_cache(maxsize=8)
def _channel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each. Cached, because making a tensor on a GPU from Python numbers makes the host wait."""
    center, spread = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
    return center[:, None, None], spread[:, None, None]
