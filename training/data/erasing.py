"""Random erasing on uint8 images."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from models.config import PreprocessConfig


class RandomErasing:
    """Fills random rectangles with noise of the images' own mean and spread, as timm's 'pixel' mode does.

    Args:
        probability: that an image is touched at all.
        max_count: number of rectangles, each of 2 % to 1/3 of the area divided by the number.
    Source: Zhong et al. 2017, with timm's parameters (area range, aspect ratio 0.3 to 3.3, ten tries).
    """

    _AREA = (0.02, 1 / 3)
    _LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
    _TRIES = 10

    def __init__(self, preprocess: PreprocessConfig, *, probability: float, max_count: int) -> None:
        self.probability = probability
        self.max_count = max_count
        self._mean = torch.tensor(preprocess.mean).view(3, 1, 1) * 255
        self._std = torch.tensor(preprocess.std).view(3, 1, 1) * 255

    def __call__(self, image: Tensor, rng: random.Random | None = None) -> Tensor:
        """A copy of uint8 [3, H, W] with its rectangles, drawn from ``rng`` or from Python's and torch's own."""
        draw: Any = rng or random  # the module has a generator's functions
        if draw.random() > self.probability:
            return image
        count = draw.randint(1, self.max_count) if self.max_count > 1 else 1
        noise = torch.Generator().manual_seed(rng.getrandbits(63)) if rng else None
        image = image.clone()
        for _ in range(count):
            self._erase(image, draw, count=count, noise=noise)
        return image

    def _erase(self, image: Tensor, draw: Any, *, count: int, noise: torch.Generator | None) -> None:
        _, height, width = image.shape
        for _ in range(self._TRIES):
            area = draw.uniform(*self._AREA) * height * width / count
            aspect = math.exp(draw.uniform(*self._LOG_ASPECT))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = draw.randint(0, height - h), draw.randint(0, width - w)
                fill = self._mean + self._std * torch.randn(3, h, w, generator=noise)
                image[:, top : top + h, left : left + w] = fill.round().clamp(0, 255).to(torch.uint8)
                return
