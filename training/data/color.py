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

_SIGN_BIT = np.int32(-(2**31))
_LUMA = np.array([19595, 38470, 7471], dtype=np.float32)  # ITU-R 601, in 1/65536; sums stay below 2^24, so exact


class ColorJitter(NamedTuple):
    """Brightness, contrast, saturation and hue by random factors in random order, as torchvision draws them."""

    brightness: Range | None
    contrast: Range | None
    saturation: Range | None
    hue: Range | None

    @classmethod
    def of_strengths(cls, strengths: float | Sequence[float]) -> ColorJitter:
        """From ``color_jitter``: one number for the first three, or three or four. Factors are 1 +- strength.

        Raises:
            ValueError: the hue would turn by more than half of the circle.
        """
        values = list(strengths) if isinstance(strengths, Sequence) else [float(strengths)] * 3
        brightness, contrast, saturation, hue = (*values, 0.0, 0.0, 0.0, 0.0)[:4]
        if hue > 0.5:
            raise ValueError(
                f"--aug-cfg color_jitter has a hue strength of {hue}: pass at most 0.5, half of the circle."
            )
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
    mean = np.float32(int(float(luma(planes).mean()) + 0.5))
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
    value = np.maximum(red, green)
    np.maximum(value, blue, out=value)
    minimum = np.minimum(red, green)
    np.minimum(minimum, blue, out=minimum)
    chroma = value - minimum
    hue = _hue(planes, minimum, chroma)
    hue += np.float32(int(factor * 255) % 256)
    hue -= 256 * np.floor(hue * (1 / 256))
    hue *= 6 / 255  # sixths of the circle: red 0, green 2, blue 4
    chroma *= 255
    chroma /= np.maximum(value, 1)
    np.floor(chroma, out=chroma)  # the 8-bit saturation
    chroma *= value
    chroma *= 1 / 255
    value += 0.5  # floor then rounds
    for plane, centre in zip(planes, (3, 2, 4), strict=True):
        # How far the plane is below the value: 0 where its colour dominates, 1 on the other side of the circle.
        np.subtract(hue, centre, out=plane)
        np.abs(plane, out=plane)
        if centre == 3:  # cyan, the opposite of red
            np.subtract(2, plane, out=plane)
        else:
            plane -= 1
        np.clip(plane, 0, 1, out=plane)
        plane *= chroma
        np.subtract(value, plane, out=plane)
        np.floor(plane, out=plane)


def _hue(planes: Planes, minimum: Planes, chroma: Planes) -> Planes:
    """Pillow's 8-bit hue, 255 for the whole circle, without a branch per sextant.

    With green at least blue, the three sextants from red over yellow and green to cyan have one formula:
    (green + blue - red + chroma - minimum) / chroma, in [0, 3]; with green below blue it is mirrored.
    """
    red, green, blue = planes
    sextants: Planes = green + blue
    sextants -= red
    sextants += chroma
    sextants -= minimum
    sextants /= np.maximum(chroma, 1)
    np.subtract(3, sextants, out=sextants)
    sign = (green - blue).view(np.int32)
    sign &= _SIGN_BIT
    bits = sextants.view(np.int32)
    bits ^= sign  # numpy's copysign takes five times as long
    np.subtract(3, sextants, out=sextants)
    sextants *= 255 / 6
    np.floor(sextants, out=sextants)
    return sextants


def _to_levels(planes: Planes) -> None:
    np.clip(planes, 0, 255, out=planes)
    np.floor(planes, out=planes)
