"""Opens image files of unknown origin: checked from their header, refused in one word, decoded by Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

from PIL import Image
from torch import Tensor

ImageTransform = Callable[[Image.Image], Tensor]
"""PIL image -> uint8 [3, H, W]."""

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below, before any pixel is decoded

_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "DIB", "ICO", "ICNS", "TGA", "PCX", "SGI", "QOI", "DDS"),
)
"""Plain raster formats. Not in the list: those that start another program, as EPS does with Ghostscript."""


class UnusableSample(Exception):
    """A permanent fault of one sample. ``reason`` is one of a few words, so that faults can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of the list that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_size(width: int, height: int, *, max_pixels: int) -> None:
    """Refuses images over the limit (0: none).

    Raises:
        UnusableSample: ``image_too_large``.
    """
    if max_pixels and width * height > max_pixels:
        raise UnusableSample("image_too_large")


def decode_image(data: bytes, *, max_pixels: int = 0) -> Image.Image:
    """An RGB image as OpenCLIP sees it: the first frame, EXIF orientation ignored, alpha dropped.

    Its size is checked from the header before anything is decoded (0: no limit).

    Raises:
        UnusableSample: ``image_too_large`` or ``broken_image``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            check_size(image.width, image.height, max_pixels=max_pixels)
            return image.convert("RGB")
    except UnusableSample:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen types for damaged files, SyntaxError among them
        raise UnusableSample("broken_image") from error
