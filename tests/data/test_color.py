from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import ColorJitter as TorchvisionJitter
from torchvision.transforms.v2 import functional as F

from tests.data.images import psnr, render
from training.data import color
from training.data.color import ColorJitter

IMAGES = [
    render(224, 224),
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)),
    Image.new("RGB", (8, 8), (255, 255, 0)),
    Image.new("L", (8, 8), 77).convert("RGB"),
]


def _planes(image: Image.Image) -> color.Planes:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.68, 1.0, 1.32, 2.0])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("image", IMAGES)
def test_blends_equal_torchvisions_on_pil_images(image: Image.Image, name: str, factor: float) -> None:
    planes = _planes(image)
    getattr(color, f"adjust_{name}")(planes, factor)
    expected = _planes(getattr(F, f"adjust_{name}")(image, factor))
    assert np.abs(planes - expected).max() <= 1
    assert (planes != expected).mean() < 1e-3


@pytest.mark.parametrize("factor", [-0.5, -0.08, 0.0, 0.03, 0.25, 0.5])
@pytest.mark.parametrize("image", IMAGES)
def test_hues_equal_torchvisions_on_pil_images(image: Image.Image, factor: float) -> None:
    planes = _planes(image)
    color.adjust_hue(planes, factor)
    # One pixel in 500 rounds to the neighbouring one of 255 hues.
    assert psnr(planes, _planes(F.adjust_hue(image, factor))) > 60


@pytest.mark.parametrize("image", IMAGES)
def test_grey_levels_equal_pillows(image: Image.Image) -> None:
    planes = _planes(image)
    color.to_grey(planes)
    np.testing.assert_array_equal(planes[0], np.asarray(image.convert("L")))
    np.testing.assert_array_equal(planes[1], planes[2])


def test_factors_and_order_are_distributed_as_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []
    names = ("brightness", "contrast", "saturation", "hue")
    for name in names:
        monkeypatch.setattr(color, f"adjust_{name}", lambda _, factor, name=name: drawn.append((name, factor)))
    strengths, rng = (0.32, 0.4, 1.5, 0.08), random.Random(0)
    for _ in range(3000):
        ColorJitter.of_strengths(strengths)(np.empty((3, 1, 1), np.float32), rng)
    reference = TorchvisionJitter(*strengths)
    torch.manual_seed(0)
    theirs = [reference.make_params([]) for _ in range(3000)]
    for index, name in enumerate(names):
        quantiles = np.linspace(0, 1, 11)
        ours = np.quantile([factor for operation, factor in drawn if operation == name], quantiles)
        expected = np.quantile([params[f"{name}_factor"] for params in theirs], quantiles)
        np.testing.assert_allclose(ours, expected, atol=0.04 * (expected[-1] - expected[0]))
        first = np.mean([operation == name for operation, _ in drawn[::4]])
        assert first == pytest.approx(np.mean([int(params["fn_idx"][0]) == index for params in theirs]), abs=0.035)


def test_a_single_strength_leaves_the_hue_alone() -> None:
    assert ColorJitter.of_strengths(0.4) == ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), None)
    assert ColorJitter.of_strengths((0.0, 2.0, 0.1)) == (None, (0.0, 3.0), (0.9, 1.1), None)


def test_a_hue_beyond_half_of_the_circle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hue strength of 0.6: pass at most 0.5"):
        ColorJitter.of_strengths((0.1, 0.1, 0.1, 0.6))


def test_whole_chains_agree_with_torchvisions() -> None:
    image, factors = IMAGES[0], [("saturation", 1.3), ("brightness", 0.8), ("hue", 0.06), ("contrast", 1.25)]
    planes = _planes(image)
    for name, factor in factors:
        getattr(color, f"adjust_{name}")(planes, factor)
        image = getattr(F, f"adjust_{name}")(image, factor)
    assert psnr(planes, _planes(image)) > 55
