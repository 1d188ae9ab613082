from __future__ import annotations

import random

import numpy as np
import open_clip.transform
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as T

from models.config import PreprocessConfig
from training.data.erasing import RandomErasing
from training.data.fast_transform import FastTransform
from training.data.image_file import ImageTransform
from training.data.transforms import build_eval_transform, build_train_transform


def _image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _reference(preprocess: PreprocessConfig, *, is_train: bool, **aug: object) -> T.Compose:
    return open_clip.transform.image_transform(
        preprocess.size,
        is_train=is_train,
        mean=preprocess.mean,
        std=preprocess.std,
        resize_mode=preprocess.resize_mode,
        interpolation=preprocess.interpolation,
        aug_cfg=aug or None,
    )


def _reference_transform(aug: dict[str, object]) -> ImageTransform:
    transform = build_train_transform(PreprocessConfig(size=(32, 32)), aug, decode="reference")
    assert not isinstance(transform, FastTransform)
    return transform


def _normalized(pixels: torch.Tensor, preprocess: PreprocessConfig) -> torch.Tensor:
    mean, std = torch.tensor(preprocess.mean).view(3, 1, 1), torch.tensor(preprocess.std).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("source", [(100, 80), (80, 121), (40, 24)])
def test_evaluation_pixels_equal_open_clips(mode: str, size: tuple[int, int], source: tuple[int, int]) -> None:
    preprocess = PreprocessConfig(size=size, resize_mode=mode)
    image = _image(*source)
    expected = _reference(preprocess, is_train=False)(image)
    pixels = build_eval_transform(preprocess)(image)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(_normalized(pixels, preprocess), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("aug", [{}, {"scale": (0.4, 1.0)}, {"use_timm": True, "scale": (0.4, 1.0)}])
def test_training_crops_equal_open_clips_for_the_same_seed(aug: dict[str, object]) -> None:
    preprocess = PreprocessConfig(size=(32, 32))
    reference, ours = (
        _reference(preprocess, is_train=True, **aug),
        build_train_transform(preprocess, aug, decode="reference"),
    )
    for seed in range(5):
        random.seed(seed), torch.manual_seed(seed)
        expected = reference(_image(96, 72))
        random.seed(seed), torch.manual_seed(seed)
        torch.testing.assert_close(_normalized(ours(_image(96, 72)), preprocess), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_timm", [False, True])
def test_grey_scale_and_jitter_happen_with_their_probabilities(use_timm: bool) -> None:
    image = _image(32, 32)
    common = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "use_timm": use_timm}
    grey = _reference_transform({**common, "gray_scale_prob": 0.3})
    torch.manual_seed(0)
    outputs = [grey(image) for _ in range(400)]
    share = np.mean([bool((out[0] == out[1]).all() and (out[1] == out[2]).all()) for out in outputs])
    assert share == pytest.approx(0.3, abs=0.07)
    jitter = _reference_transform({**common, "color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.6})
    plain = _reference_transform(common)(image)
    share = np.mean([not torch.equal(jitter(image), plain) for _ in range(400)])
    assert share == pytest.approx(0.6, abs=0.08)


def test_open_clips_effective_meaning_drops_what_it_drops_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    aug = {"use_timm": True, "gray_scale_prob": 1.0, "scale": (1.0, 1.0), "openclip_keys": True}
    out = _reference_transform(aug)(_image(32, 32))
    assert not torch.equal(out[0], out[1])
    assert "gray_scale_prob has no effect" in caplog.text


def test_jitter_probability_without_jitter_is_an_error() -> None:
    with pytest.raises(ValueError, match="color_jitter_prob=0.8 without color_jitter"):
        build_train_transform(PreprocessConfig(size=(8, 8)), {"color_jitter_prob": 0.8})


def test_erasing_follows_timms_distribution_of_areas() -> None:
    from timm.data.random_erasing import RandomErasing as Reference

    preprocess = PreprocessConfig(size=(64, 64))
    ours, theirs = RandomErasing(preprocess, probability=0.5, max_count=1), Reference(0.5, mode="pixel", device="cpu")
    random.seed(1)
    grey = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    our_areas = [(ours(grey)[0] != 255).float().mean().item() for _ in range(500)]
    random.seed(1)
    their_areas = [(theirs(torch.full((3, 64, 64), 99.0))[0] != 99.0).float().mean().item() for _ in range(500)]
    # Noise that happens to be 255 is not counted, so areas agree within a few per cent of themselves.
    np.testing.assert_allclose(our_areas, their_areas, rtol=0.12, atol=1e-3)


def test_erased_pixels_have_the_models_mean_and_spread() -> None:
    preprocess = PreprocessConfig(size=(64, 64))
    erase = RandomErasing(preprocess, probability=1.0, max_count=1)
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    values = torch.cat([out[:, (out != 255).all(0)] for out in (erase(white) for _ in range(50))], dim=1).float()
    expected = torch.tensor(preprocess.mean) * 255
    assert (values.mean(1) - expected).abs().max() < 12
