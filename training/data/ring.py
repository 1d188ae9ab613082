"""A ring of batches in memory that the trainer shares with its loader workers: samples are written where they are used.

    slot 0: images [B, 3, H, W] uint8 | texts [B, L] int64 | samples [B, 3] int64     slot 1: ...

Where the device decodes, a row of images is longer and holds either pixels or a file (``encoded_image.py``).

The memory has no name in /dev/shm: a container's limit there does not apply, and the kernel frees it when the last
process that maps it is gone, however it went.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.batch import SAMPLE_COLUMNS, BatchBuffers
from training.data.encoded_image import CROP_COLUMNS, EncodedRows

_ALIGNMENT = mmap.PAGESIZE


class RingLayout(NamedTuple):
    """What a worker needs to know to find its rows."""

    num_slots: int
    batch_size: int
    image_size: tuple[int, int]
    """(height, width)"""
    context_length: int
    file_room: int = 0
    """Bytes of a row that may hold a file; 0: rows hold pixels only."""

    @property
    def parts(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """(dtype, shape) of a slot's tensors, in order."""
        batch = self.batch_size
        rows = (batch, self.file_room) if self.file_room else (batch, 3, *self.image_size)
        parts = (
            (torch.uint8, rows),
            (torch.int64, (batch, self.context_length)),
            (torch.int64, (batch, len(SAMPLE_COLUMNS))),
        )
        return (*parts, (torch.int64, (batch, len(CROP_COLUMNS)))) if self.file_room else parts

    def buffers(self, tensors: Sequence[Tensor]) -> BatchBuffers:
        """A slot's tensors, one for each part."""
        if not self.file_room:
            images, texts, samples = tensors
            return BatchBuffers(images, texts, samples)
        rows, texts, samples, crops = tensors
        height, width = self.image_size
        images = rows[:, : 3 * height * width].unflatten(1, (3, height, width))  # [B, room] -> [B, 3, H, W]
        return BatchBuffers(images, texts, samples, EncodedRows(rows, crops))

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, every part at a page of its own."""
        return sum(_padded(dtype, shape) for dtype, shape in self.parts)


class BatchRing:
    """The mapped ring. The trainer makes it; workers map it by the file descriptor they inherit."""

    def __init__(self, layout: RingLayout, *, fd: int | None = None) -> None:
        self.layout = layout
        self.fd = _anonymous_file(layout.num_slots * layout.slot_bytes) if fd is None else fd
        self._map = mmap.mmap(self.fd, layout.num_slots * layout.slot_bytes)
        self._slots = [self._view(slot) for slot in range(layout.num_slots)]

    def buffers(self, slot: int) -> BatchBuffers:
        """The tensors of a slot; they are the shared memory itself."""
        return self._slots[slot]

    def whole(self) -> Tensor:
        """uint8, all bytes of the ring: what a CUDA context registers as pinned memory."""
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def close(self) -> None:
        """Gives the descriptor back; the memory lives as long as a tensor that views it."""
        os.close(self.fd)

    def _view(self, slot: int) -> BatchBuffers:
        offset = slot * self.layout.slot_bytes
        tensors = []
        for dtype, shape in self.layout.parts:
            count = torch.Size(shape).numel()
            tensors.append(torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape))
            offset += _padded(dtype, shape)
        return self.layout.buffers(tensors)


def _padded(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-dtype.itemsize * torch.Size(shape).numel() // _ALIGNMENT) * _ALIGNMENT


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("clipyard-batches")
    else:  # not Linux: an unlinked file
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
