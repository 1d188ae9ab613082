"""The fast training transform: encoded image -> crop -> resize -> colours -> uint8 [3, H, W], on one core.

    header -> crop box -> libjpeg-turbo, reduced if that cannot be seen -> antialiased uint8 resize
           -> jitter -> grey -> erase

Every random number comes from the sample's own generator, so the same (file, seed) always gives the same pixels.
"""

from __future__ import annotations

import random

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.augmentation import Augmentation
from training.data.color import to_grey
from training.data.image_file import check_scans, check_size, decode_image
from training.data.jpeg import decode_jpeg_crop, read_jpeg_size

_INTERPOLATIONS = ("bilinear", "bicubic")
_PILLOW_REORDERS = int(PIL.__version__.split(".")[0]) >= 13
"""Since release 13 Pillow makes the vertical pass first where it removes more than twice the pixels. The image between
the passes is rounded, so that the order is seen: 55 dB."""


class FastTransform:
    """Decodes and augments; ``size`` is the model's (height, width)."""

    def __init__(self, size: tuple[int, int], augmentation: Augmentation) -> None:
        self.size = size
        self.augmentation = augmentation

    def __call__(self, data: bytes, *, seed: int, max_pixels: int = 0) -> Tensor:
        """The file as uint8 [3, H, W].

        Raises:
            UnusableSample: ``image_too_large`` (told from the header) or ``broken_image``.
        """
        rng = random.Random(seed)
        crop = self._crop_of_jpeg(data, rng, max_pixels=max_pixels)
        if crop is None:
            rng.seed(seed)
            crop = self._crop_of_any(data, rng, max_pixels=max_pixels)
        image = resize(crop, self.size, mode=self._interpolation(rng))
        self._recolour(image, rng)
        erasing = self.augmentation.erasing
        return erasing(image, rng) if erasing else image

    def _crop_of_jpeg(self, data: bytes, rng: random.Random, *, max_pixels: int) -> Tensor | None:
        size = read_jpeg_size(data)
        if size is None:
            return None
        check_size(size.width, size.height, max_pixels=max_pixels)
        check_scans(data)
        box = self.augmentation.crop.draw(*size, rng)
        pixels = decode_jpeg_crop(data, size, box, target=self.size)
        return None if pixels is None else torch.from_numpy(pixels)

    def _crop_of_any(self, data: bytes, rng: random.Random, *, max_pixels: int) -> Tensor:
        image = decode_image(data, max_pixels=max_pixels)
        top, left, height, width = self.augmentation.crop.draw(image.height, image.width, rng)
        return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))

    def _interpolation(self, rng: random.Random) -> str:
        mode = self.augmentation.interpolation
        return rng.choice(_INTERPOLATIONS) if mode == "random" else mode

    def _draw_colours(self, rng: random.Random) -> tuple[bool, bool]:
        """(whether to jitter, whether to make grey)"""
        jittered = self.augmentation.jitter is not None and rng.random() < self.augmentation.jitter_probability
        return jittered, rng.random() < self.augmentation.grey_probability

    def _recolour(self, image: Tensor, rng: random.Random) -> None:
        """Jitter and grey scale, in place."""
        jittered, grey = self._draw_colours(rng)
        if not jittered and not grey:
            return
        pixels = image.numpy()
        planes = pixels.astype(np.float32)
        if jittered:
            assert self.augmentation.jitter is not None
            self.augmentation.jitter(planes, rng)
        if grey:
            to_grey(planes)
        np.copyto(pixels, planes, casting="unsafe")


def resize(pixels: Tensor, size: tuple[int, int], *, mode: str) -> Tensor:
    """uint8 [h, w, 3] -> [3, H, W], antialiased, within one or two levels of Pillow (70 dB) at a fifth of its time."""
    height, width, _ = pixels.shape
    batch = pixels.permute(2, 0, 1).unsqueeze(0)  # [h, w, 3] -> [1, 3, h, w], channels last: the kernel's fast path
    if _PILLOW_REORDERS and height - size[0] > 2 * max(0, width - size[1]):
        # Without gaps between the rows the image stays channels last between the passes: a quarter faster.
        batch = _interpolate(batch.contiguous(memory_format=torch.channels_last), (size[0], width), mode)
    return _interpolate(batch, size, mode)[0].contiguous()


def _interpolate(batch: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(batch, size, mode=mode, antialias=True, align_corners=False)
