from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2 as T

from training.data.crop import CropBox, RandomCrop

DRAWS = 4000
# Two samples of 4000: their empirical distributions differ by 0.0364 in one of a hundred cases.
# Source: Kolmogorov-Smirnov, 1.628 * sqrt(2 / 4000).
LIMIT = 0.0364


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference between two empirical distribution functions."""
    points = np.union1d(first, second)
    ranks = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(ranks[0] - ranks[1]).max())


def _boxes(crop: RandomCrop, height: int, width: int) -> np.ndarray:
    return np.array([crop.draw(height, width, random.Random(seed)) for seed in range(DRAWS)])


def _features(boxes: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    top, left, h, w = boxes.T.astype(float)
    return {"area": h * w, "aspect": w / h, "top": top / np.maximum(1, height - h), "left": left / (1 + width - w)}


@pytest.mark.parametrize("size", [(240, 320), (500, 100), (37, 41), (64, 2000)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.4, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_boxes_are_distributed_as_the_librarys(size: tuple[int, int], scale: tuple[float, float], library: str) -> None:
    random.seed(3), torch.manual_seed(3)
    ratio = (3 / 4, 4 / 3)
    if library == "timm":
        image = Image.new("L", size[::-1])
        draw = RandomResizedCropAndInterpolation.get_params
        theirs = np.array([draw(image, scale, ratio) for _ in range(DRAWS)])
    else:
        crop, tensor = T.RandomResizedCrop([8, 8], scale=scale, ratio=ratio), [torch.empty(3, *size)]
        theirs = np.array([list(crop.make_params(tensor).values()) for _ in range(DRAWS)])
    ours = _features(_boxes(RandomCrop(scale, ratio), *size), *size)
    for name, values in _features(theirs, *size).items():
        assert _distance(ours[name], values) < LIMIT, name


def test_another_scale_would_be_noticed() -> None:
    near, far = (
        _features(_boxes(RandomCrop(scale, (3 / 4, 4 / 3)), 240, 320), 240, 320) for scale in ((0.4, 1), (0.45, 1))
    )
    assert _distance(near["area"], far["area"]) > LIMIT


@pytest.mark.parametrize("size", [(1, 1), (1, 65_000), (65_000, 1), (2, 3)])
def test_boxes_of_extreme_images_lie_inside_and_are_not_empty(size: tuple[int, int]) -> None:
    for top, left, height, width in _boxes(RandomCrop((0.08, 1.0), (3 / 4, 4 / 3)), *size)[:500]:
        assert 0 <= top < top + height <= size[0]
        assert 0 <= left < left + width <= size[1]


def test_aligning_moves_every_edge_inwards_to_the_grid() -> None:
    assert CropBox(3, 4, 10, 9).aligned(4) == CropBox(4, 4, 8, 8)
    assert CropBox(3, 5, 10, 9).aligned(1) == CropBox(3, 5, 10, 9)
