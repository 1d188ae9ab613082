"""OpenCLIP's own transforms: PIL image -> uint8 [3, H, W], with the pixels and random draws of torchvision and timm.

Loader workers import this only for ``--decode reference``: torchvision and timm cost seconds and 100 MB per process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from PIL import Image
from timm.data import create_transform
from torch import nn
from torchvision.transforms import v2 as T
from torchvision.transforms.functional import InterpolationMode

from models.config import PreprocessConfig
from training.data.augmentation import DEFAULT_RATIO, DEFAULT_SCALE
from training.data.erasing import RandomErasing
from training.data.image_file import ImageTransform


def build_eval_transform(preprocess: PreprocessConfig) -> ImageTransform:
    """Resize and crop as the model was meant to see images (``resize_mode``: shortest, longest or squash)."""
    height, width = preprocess.size
    interpolation = _interpolation(preprocess.interpolation)
    steps: list[nn.Module | Callable[[Any], Any]]
    if preprocess.resize_mode == "squash":
        steps = [T.Resize([height, width], interpolation=interpolation)]
    else:
        steps = [
            _ResizeKeepingRatio(preprocess.size, interpolation, longest=preprocess.resize_mode == "longest"),
            _CenterCropOrPad(preprocess.size, fill=preprocess.fill_color),
        ]
    return _compose([*steps, T.PILToTensor()])


def build_reference_transform(
    preprocess: PreprocessConfig, config: Mapping[str, Any], *, use_timm: bool
) -> ImageTransform:
    """Random crop and resize, then what ``config`` asks for; random numbers are Python's and torch's own."""
    steps = _timm_steps(preprocess, config) if use_timm else _torchvision_steps(preprocess, config)
    if config.get("re_prob"):
        steps.append(RandomErasing(preprocess, probability=config["re_prob"], max_count=config.get("re_count") or 1))
    return _compose(steps)


def _timm_steps(preprocess: PreprocessConfig, config: Mapping[str, Any]) -> list[Any]:
    # timm reads an absent scale as (0.08, 1); OpenCLIP's own default is the gentler (0.9, 1).
    transform = create_transform(
        input_size=(3, *preprocess.size),
        is_training=True,
        hflip=0.0,
        scale=tuple(config.get("scale") or DEFAULT_SCALE),
        ratio=config.get("ratio"),
        color_jitter=config.get("color_jitter"),
        color_jitter_prob=config.get("color_jitter_prob"),
        grayscale_prob=config.get("gray_scale_prob") or 0.0,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        normalize=False,
    )
    return [transform]


def _torchvision_steps(preprocess: PreprocessConfig, config: Mapping[str, Any]) -> list[Any]:
    steps: list[Any] = [
        T.RandomResizedCrop(
            list(preprocess.size),
            scale=tuple(config.get("scale") or DEFAULT_SCALE),
            ratio=tuple(config.get("ratio") or DEFAULT_RATIO),
            interpolation=InterpolationMode.BICUBIC,
        )
    ]
    jitter, jitter_probability = config.get("color_jitter"), config.get("color_jitter_prob")
    if jitter is not None and jitter_probability != 0:
        strengths = jitter if isinstance(jitter, tuple | list) else (jitter,) * 3
        # OpenCLIP applies jitter only with a probability; a jitter without one is meant for every image.
        steps.append(T.RandomApply([T.ColorJitter(*strengths)], p=jitter_probability or 1.0))
    if config.get("gray_scale_prob"):
        steps.append(T.RandomGrayscale(p=config["gray_scale_prob"]))
    return [*steps, T.PILToTensor()]


def _compose(steps: list[Any]) -> ImageTransform:
    return cast(ImageTransform, T.Compose(steps))


def _interpolation(name: str) -> InterpolationMode:
    return InterpolationMode.BILINEAR if name == "bilinear" else InterpolationMode.BICUBIC


class _ResizeKeepingRatio:
    """Resizes so that the image covers the target (shortest), or fits into it (longest)."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode, *, longest: bool) -> None:
        self.size = size
        self.interpolation = interpolation
        self.longest = longest

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if height == width and not self.longest:
            # torchvision's own rule for the shorter edge: truncates where round() would not
            shorter: Image.Image = T.functional.resize(image, [height], interpolation=self.interpolation)
            return shorter
        ratios = (image.height / height, image.width / width)
        ratio = max(ratios) if self.longest else min(ratios)
        target = [round(image.height / ratio), round(image.width / ratio)]
        resized: Image.Image = T.functional.resize(image, target, interpolation=self.interpolation)
        return resized


class _CenterCropOrPad:
    """Cuts the centre out, and pads with ``fill`` where the image is smaller than the target."""

    def __init__(self, size: tuple[int, int], *, fill: int) -> None:
        self.size = size
        self.fill = fill

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        pad_x, pad_y = max(0, width - image.width), max(0, height - image.height)
        if pad_x or pad_y:
            padding = [pad_x // 2, pad_y // 2, pad_x - pad_x // 2, pad_y - pad_y // 2]
            image = T.functional.pad(image, padding, fill=self.fill)
        cropped: Image.Image = T.functional.center_crop(image, [height, width])
        return cropped
