"""An image on its way to the device as a JPEG: its file, what is to be seen of it, and the row that holds both.

A row of ``file_room`` bytes holds either the pixels or the file, so a batch needs no second place for its files:

    files [B, room] uint8:  | 3 x H x W pixels | unused |  or  | the file | unused |
    crops [B, 8] int64:     0, ...                         or  its bytes, height, width, box, interpolation

Legend: B rank batch, H and W the model's image size.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from training.data.crop import CropBox
from training.data.jpeg import JpegSize

HOST_REASONS = ("not_jpeg", "other_jpeg", "damaged", "too_large", "recoloured", "refused")
"""Why an image was decoded on the host although the device was asked to."""
CROP_COLUMNS = ("bytes", "height", "width", "top", "left", "box_height", "box_width", "interpolation")
_INTERPOLATIONS = ("bicubic", "bilinear")
_LEAST_ROOM = 256 << 10
"""Bytes. Web photos of 512 px have 40 to 150 kB, of 1024 px mostly under 256."""


class DecodedOnHost(Exception):
    """The device cannot decode this image, or is not to; ``reason`` is one of ``HOST_REASONS``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EncodedImage(NamedTuple):
    """A JPEG that the device can decode, and what is to be seen of it."""

    data: bytes
    size: JpegSize
    box: CropBox
    interpolation: str


class EncodedCrop(NamedTuple):
    """``EncodedImage`` without its file."""

    size: JpegSize
    box: CropBox
    interpolation: str


class EncodedRows(NamedTuple):
    """The rows of a batch of which some hold files."""

    files: Tensor
    """uint8 [B, room]"""
    crops: Tensor
    """int64 [B, 8]: ``CROP_COLUMNS``; no bytes: the row holds pixels."""

    def put(self, row: int, image: EncodedImage) -> None:
        """Writes a file, and what is to be seen of it."""
        length = len(image.data)
        self.files.numpy()[row, :length] = np.frombuffer(image.data, dtype=np.uint8)
        self.crops.numpy()[row] = (length, *image.size, *image.box, _INTERPOLATIONS.index(image.interpolation))

    def put_none(self, row: int) -> None:
        """Marks a row as one of pixels."""
        self.crops.numpy()[row, 0] = 0

    def take(self) -> Iterator[tuple[Tensor, EncodedCrop] | None]:
        """(file uint8 [n], what is to be seen of it) of every row; None for those that hold pixels."""
        for file, (length, height, width, *box, interpolation) in zip(self.files, self.crops.tolist(), strict=True):
            if not length:
                yield None
                continue
            yield file[:length], EncodedCrop(JpegSize(height, width), CropBox(*box), _INTERPOLATIONS[interpolation])


def file_room(size: tuple[int, int]) -> int:
    """Bytes of a row, for images of the model's (height, width): whole pages, with room for its pixels."""
    return -(-max(_LEAST_ROOM, 3 * size[0] * size[1]) // mmap.PAGESIZE) * mmap.PAGESIZE
