"""Decodes the part of a JPEG that a crop needs, with libjpeg-turbo and at reduced size where that cannot be seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from training.data.crop import CropBox
from training.data.image_file import JPEG_SIGNATURE

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_COLORSPACES = ("YCbCr", "Gray", "RGB")
"""The others are CMYK, whose conversion to RGB is Pillow's to make."""
_FACTORS = (8, 4, 2)
_MIN_OVERSIZE = 2
"""Reduced crops keep at least this many times the target's height and width, so that the final, antialiased resize
decides what is seen: at least 47 dB against full size on photos and textures (1.5 times: 43 dB)."""


class JpegSize(NamedTuple):
    """Height and width from the header, in pixels."""

    height: int
    width: int


def read_jpeg_size(data: bytes) -> JpegSize | None:
    """The size from the header (1 us); None if this is no JPEG, or one that only Pillow should judge."""
    if not data.startswith(JPEG_SIGNATURE):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return JpegSize(height, width) if colorspace in _COLORSPACES else None


def reduction(box: CropBox, *, target: tuple[int, int]) -> int:
    """By how much the image may be reduced while decoding: 1, 2, 4 or 8."""
    for factor in _FACTORS:
        needed = _MIN_OVERSIZE * factor
        reduced = box.aligned(factor)
        if reduced.height >= needed * target[0] and reduced.width >= needed * target[1]:
            return factor
    return 1


def decode_jpeg_crop(data: bytes, size: JpegSize, box: CropBox, *, target: tuple[int, int]) -> Pixels | None:
    """The pixels of ``box`` [h, w, 3], at full size equal to Pillow's, else reduced and cut along whole pixels.

    None where libjpeg has anything to complain about: Pillow then decides, so that both accept the same files.
    """
    factor = reduction(box, target=target)
    height, width = -(-size.height // factor), -(-size.width // factor)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=factor, strict=True
        )
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    box = box.aligned(factor)
    top, left = box.top // factor, box.left // factor
    return pixels[top : top + box.height // factor, left : left + box.width // factor]
