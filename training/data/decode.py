"""Decodes one raw sample to (uint8 image, caption), or says in one word why it cannot be used."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.captions import CaptionReader
from training.data.captions import decode_caption as decode_caption
from training.data.captions import first_member as first_member
from training.data.device_transform import DeviceTransform
from training.data.encoded_image import DecodedOnHost, EncodedImage
from training.data.fast_transform import FastTransform
from training.data.image_file import ImageTransform as ImageTransform
from training.data.image_file import UnusableSample as UnusableSample
from training.data.image_file import decode_image as decode_image
from training.data.tar_reader import RawSample


class Sample(NamedTuple):
    """A decoded, augmented sample."""

    key: str
    image: Tensor | EncodedImage
    """uint8 [3, H, W], or what the device makes it from."""
    caption: str
    on_host: str = ""
    """Why the image was decoded here although the device was to do it."""


class SampleDecoder:
    """Turns raw samples into samples with one transform; the randomness of each is keyed, not drawn in sequence."""

    def __init__(
        self,
        *,
        transform: FastTransform | ImageTransform,
        image_key: str,
        text_key: str,
        max_image_pixels: int,
        json_text_key: str | None = None,
        json_text_key_probs: Sequence[float] | None = None,
    ) -> None:
        self.transform = transform
        self.image_extensions = tuple(image_key.lower().split(";"))
        self.max_image_pixels = max_image_pixels
        self.read_caption = CaptionReader(
            text_key=text_key, json_text_key=json_text_key, json_text_key_probs=json_text_key_probs
        )

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        """Decodes and augments; the same (raw, seed) always gives the same pixels and the same caption.

        Raises:
            UnusableSample: with the reason ``no_image``, ``no_caption``, ``empty_caption``, ``caption_not_utf8``,
                ``caption_too_long``, ``json_broken``, ``json_too_large``, ``image_too_large`` or ``broken_image``.
        """
        caption = self.read_caption(raw, seed=seed)
        data = first_member(raw, self.image_extensions, missing="no_image")
        if not isinstance(self.transform, DeviceTransform):
            return Sample(raw.key, self._image(data, seed), caption)
        try:
            encoded = self.transform.encode(data, seed=seed, max_pixels=self.max_image_pixels)
        except DecodedOnHost as why:
            return Sample(raw.key, self._image(data, seed), caption, why.reason)
        return Sample(raw.key, encoded, caption)

    def _image(self, data: bytes, seed: int) -> Tensor:
        if isinstance(self.transform, FastTransform):
            return self.transform(data, seed=seed, max_pixels=self.max_image_pixels)
        image = decode_image(data, max_pixels=self.max_image_pixels)
        # torchvision and timm draw from the global generators, which cost 50 us to save, seed and restore.
        with torch.random.fork_rng(devices=[]):
            state = random.getstate()
            # Not torch.manual_seed, which would also reset the GPUs' generators, where the model's dropout draws.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            try:
                return self.transform(image)
            finally:
                random.setstate(state)
