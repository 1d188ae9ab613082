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


JPEG_SIGNATURE = b"\xff\xd8\xff"
_START_OF_SCAN = b"\xff\xda"
_MAX_SCANS = 100


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


def check_scans(data: bytes) -> None:
    """Refuses JPEGs of very many scans: each costs a pass over the image, and a hostile file has thousands in 100 kB.

    Raises:
        UnusableSample: ``broken_image``.
    """
    # Counting takes 1 us per kB, so only where there can be more than a few: ordinary encoders write about ten.
    if _is_progressive_jpeg(data) and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise UnusableSample("broken_image")


def _is_progressive_jpeg(data: bytes) -> bool:
    """Whether the frame is progressive, or begins with a scan of some of its components only."""
    place, components = 2, 0
    while data[place : place + 1] == b"\xff" and place + 4 < len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xC2:
            return True
        if marker in (0xC0, 0xC1):
            components = data[place + 9] if place + 9 < len(data) else 0
        elif marker == 0xDA:
            return data[place + 4] != components
        place += 1 if marker == 0xFF else 2 + length  # markers may be padded with FF
    return True


def decode_image(data: bytes, *, max_pixels: int = 0) -> Image.Image:
    """An RGB image as OpenCLIP sees it: the first frame, EXIF orientation ignored, alpha dropped.

    Its size is checked from the header before anything is decoded (0: no limit).

    Raises:
        UnusableSample: ``image_too_large`` or ``broken_image``.
    """
    if data.startswith(JPEG_SIGNATURE):
        check_scans(data)
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            check_size(image.width, image.height, max_pixels=max_pixels)
            return image.convert("RGB")
    except (UnusableSample, MemoryError):  # a machine without memory says nothing about the image
        raise
    except Exception as error:  # Pillow's plugins raise a dozen types for damaged files, SyntaxError among them
        raise UnusableSample("broken_image") from error
