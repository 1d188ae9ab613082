"""Decodes one raw sample to (uint8 image, caption), or says in one word why it cannot be used."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.fast_transform import FastTransform
from training.data.image_file import ImageTransform as ImageTransform
from training.data.image_file import UnusableSample as UnusableSample
from training.data.image_file import decode_image as decode_image
from training.data.tar_reader import RawSample

MAX_CAPTION_BYTES = 1 << 16
"""Longer captions are refused: a model reads the first 77 tokens or so, the rest would only cost time."""

_VISIBLE = re.compile("[^\\s\\x00-\\x1f\\x7f-\\xa0\\xad\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\ufeff]")
"""Anything but white space, control characters, byte order marks and marks of writing direction."""


class Sample(NamedTuple):
    """A decoded, augmented sample."""

    key: str
    image: Tensor
    """uint8 [3, H, W]."""
    caption: str


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
        self.text_extensions = tuple(text_key.lower().split(";"))
        self.max_image_pixels = max_image_pixels
        self.json_text_key = json_text_key
        self.json_text_key_probs = json_text_key_probs

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        """Decodes and augments; the same (raw, seed) always gives the same pixels and the same caption.

        Raises:
            UnusableSample: with the reason ``no_image``, ``no_caption``, ``empty_caption``, ``caption_not_utf8``,
                ``caption_too_long``, ``image_too_large`` or ``broken_image``.
        """
        caption = self._caption(raw, seed)
        return Sample(raw.key, self._image(raw, seed), caption)

    def _caption(self, raw: RawSample, seed: int) -> str:
        return decode_caption(first_member(raw, self.text_extensions, missing="no_caption"))

    def _image(self, raw: RawSample, seed: int) -> Tensor:
        data = first_member(raw, self.image_extensions, missing="no_image")
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


def first_member(raw: RawSample, extensions: Sequence[str], *, missing: str) -> bytes:
    """The data of the first of ``extensions`` that the sample has."""
    for extension in extensions:
        if extension in raw.members:
            return raw.members[extension]
    raise UnusableSample(missing)


def decode_caption(data: bytes) -> str:
    """A caption as text; an empty one is unusable (every empty caption would be a negative of every other)."""
    if len(data) > MAX_CAPTION_BYTES:
        raise UnusableSample("caption_too_long")
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UnusableSample("caption_not_utf8") from None
    if not _VISIBLE.search(caption):
        raise UnusableSample("empty_caption")
    return caption
