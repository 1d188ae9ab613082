"""Image transforms: PIL image -> uint8 [3, H, W] at the model's size. Normalisation happens later, on the device.

Augmentation keys mean what OpenCLIP's documentation of them says, with and without ``use_timm``; where its code does
less (it drops some keys without a word), ``openclip_keys=True`` asks for exactly that. docs/data.md has the table.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import v2 as T
from torchvision.transforms.functional import InterpolationMode

from models.config import PreprocessConfig

logger = logging.getLogger(__name__)

ImageTransform = Callable[[Image.Image], Tensor]

_DEFAULT_SCALE = (0.9, 1.0)
_DEFAULT_RATIO = (3 / 4, 4 / 3)


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


def build_train_transform(preprocess: PreprocessConfig, aug_cfg: Mapping[str, Any]) -> ImageTransform:
    """Random crop and resize, then what ``aug_cfg`` asks for, with OpenCLIP's keys.

    Raises:
        ValueError: ``color_jitter_prob`` without a ``color_jitter`` to apply.
    """
    config = dict(aug_cfg)
    use_timm = bool(config.get("use_timm", False))
    if config.pop("openclip_keys", False):
        config = _openclip_meaning(config, use_timm=use_timm)
    steps = _timm_steps(preprocess, config) if use_timm else _torchvision_steps(preprocess, config)
    if config.get("re_prob"):
        steps.append(RandomErasing(preprocess, probability=config["re_prob"], max_count=config.get("re_count") or 1))
    return _compose(steps)


def _openclip_meaning(config: dict[str, Any], *, use_timm: bool) -> dict[str, Any]:
    """What OpenCLIP 3.3.0 does with these keys, as opposed to what they say."""
    ignored = ["color_jitter_prob", "gray_scale_prob"] if use_timm else ["ratio", "re_prob", "re_count"]
    if not use_timm and not config.get("color_jitter_prob"):
        ignored.append("color_jitter")
    for key in ignored:
        if key in config:
            logger.warning("--aug-cfg %s has no effect here: openclip_keys=True asks for OpenCLIP's behaviour.", key)
    return {key: value for key, value in config.items() if key not in ignored}


def _timm_steps(preprocess: PreprocessConfig, config: Mapping[str, Any]) -> list[Any]:
    # timm reads an absent scale as (0.08, 1); OpenCLIP's own default is the gentler (0.9, 1).
    transform = create_transform(
        input_size=(3, *preprocess.size),
        is_training=True,
        hflip=0.0,
        scale=tuple(config.get("scale") or _DEFAULT_SCALE),
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
            scale=tuple(config.get("scale") or _DEFAULT_SCALE),
            ratio=tuple(config.get("ratio") or _DEFAULT_RATIO),
            interpolation=InterpolationMode.BICUBIC,
        )
    ]
    jitter, jitter_probability = config.get("color_jitter"), config.get("color_jitter_prob")
    if jitter_probability and jitter is None:
        raise ValueError(f"--aug-cfg color_jitter_prob={jitter_probability} without color_jitter: pass both.")
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

    def __call__(self, image: Tensor) -> Tensor:
        if random.random() > self.probability:
            return image
        count = random.randint(1, self.max_count) if self.max_count > 1 else 1
        image = image.clone()
        for _ in range(count):
            self._erase(image, count=count)
        return image

    def _erase(self, image: Tensor, *, count: int) -> None:
        _, height, width = image.shape
        for _ in range(self._TRIES):
            area = random.uniform(*self._AREA) * height * width / count
            aspect = math.exp(random.uniform(*self._LOG_ASPECT))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                noise = self._mean + self._std * torch.randn(3, h, w)
                image[:, top : top + h, left : left + w] = noise.round().clamp(0, 255).to(torch.uint8)
                return
