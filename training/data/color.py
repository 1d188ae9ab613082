"""Colour augmentations on small uint8 images, with Pillow's arithmetic and none of its conversions.

Planes are float32 holding whole numbers 0-255: every operation rounds as Pillow does, so chains of them agree with
torchvision's on PIL images, but for single levels where float rounding meets a border. H, W: image height and width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Planes = np.ndarray[Any, np.dtype[np.float32]]
Range = tuple[float, float]

_LUMA = np.array([19595, 38470, 7471], dtype=np.float32)  # ITU-R 601, in 1/65536; sums stay below 2^24, so exact


class ColorJitter(NamedTuple):
    """Brightness, contrast, saturation and hue by random factors in random order, as torchvision draws them."""

    brightness: Range | None
    contrast: Range | None
    saturation: Range | None
    hue: Range | None

    @classmethod
    def of_strengths(cls, strengths: float | Sequence[float]) -> ColorJitter:
        """From ``color_jitter``: one number for the first three, or three or four. Factors are 1 +- strength."""
        values = list(strengths) if isinstance(strengths, Sequence) else [float(strengths)] * 3
        brightness, contrast, saturation, hue = (*values, 0.0, 0.0, 0.0, 0.0)[:4]
        return cls(
            _around_one(brightness), _around_one(contrast), _around_one(saturation), (-hue, hue) if hue else None
        )

    def __call__(self, planes: Planes, rng: random.Random) -> None:
        """Changes float32 [3, H, W] in place."""
        adjusters = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        operations = [
            (adjust, rng.uniform(*factors))
            for adjust, factors in zip(adjusters, self, strict=True)
            if factors is not None
        ]
        rng.shuffle(operations)
        for adjust, factor in operations:
            adjust(planes, factor)


def _around_one(strength: float) -> Range | None:
    return (max(0.0, 1 - strength), 1 + strength) if strength else None


def luma(planes: Planes) -> Planes:
    """Grey levels [H, W] of [3, H, W], as Pillow's conversion to "L"."""
    grey: Planes = np.tensordot(_LUMA, planes, axes=1)  # [3] x [3, H, W] -> [H, W]
    grey += 32768
    grey *= 1 / 65536
    np.floor(grey, out=grey)
    return grey


def to_grey(planes: Planes) -> None:
    """All three planes become the grey level."""
    planes[:] = luma(planes)


def adjust_brightness(planes: Planes, factor: float) -> None:
    """Blends with black; ``factor`` 1 changes nothing, as below."""
    planes *= np.float32(factor)
    _to_levels(planes)


def adjust_contrast(planes: Planes, factor: float) -> None:
    """Blends with the mean grey level of the image."""
    mean = np.float32(int(float(luma(planes).mean(dtype=np.float64)) + 0.5))
    planes -= mean
    planes *= np.float32(factor)
    planes += mean
    _to_levels(planes)


def adjust_saturation(planes: Planes, factor: float) -> None:
    """Blends every pixel with its own grey level."""
    grey = luma(planes)
    planes -= grey
    planes *= np.float32(factor)
    planes += grey
    _to_levels(planes)


def adjust_hue(planes: Planes, factor: float) -> None:
    """Turns the hue by ``factor`` of the whole circle; hue and saturation pass through 8 bits, as in Pillow."""
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    saturation = np.floor(chroma * 255 / np.maximum(value, 1))
    hue = _hue(planes, value, chroma)
    hue += np.float32(int(factor * 255) % 256)
    hue -= 256 * np.floor(hue * (1 / 256))
    hue *= 6 / 255  # sixths of the circle: red 0, green 2, blue 4
    saturation *= value
    saturation *= 1 / 255
    for plane, centre in zip(planes, (3.0, 2.0, 4.0), strict=True):
        # How far the plane is below the value: 0 where its colour dominates, 1 on the other side of the circle.
        distance = np.abs(hue - np.float32(centre))
        below = np.float32(2) - distance if centre == 3.0 else distance - np.float32(1)
        np.clip(below, 0, 1, out=below)
        below *= saturation
        np.floor(value - below + np.float32(0.5), out=plane)


def _hue(planes: Planes, value: Planes, chroma: Planes) -> Planes:
    """Pillow's 8-bit hue, 255 for the whole circle, without a branch per sextant.

    With green at least blue, the three sextants from red over yellow and green to cyan have one formula:
    (green + blue - red + max - 2 min) / chroma, in [0, 3]; with green below blue it is mirrored.
    """
    red, green, blue = planes
    minimum = value - chroma
    sextants: Planes = green + blue - red + value - 2 * minimum
    sextants /= np.maximum(chroma, 1)
    sextants = np.float32(3) - np.copysign(np.float32(3) - sextants, green - blue)
    sextants *= 255 / 6
    np.floor(sextants, out=sextants)
    return sextants


def _to_levels(planes: Planes) -> None:
    np.clip(planes, 0, 255, out=planes)
    np.floor(planes, out=planes)
