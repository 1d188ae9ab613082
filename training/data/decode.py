"""Decodes one raw sample to (uint8 image, caption), or says in one word why it cannot be used."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from training.data.tar_reader import RawSample

MAX_CAPTION_BYTES = 1 << 16
"""Longer captions are refused: tokenizers take time quadratic in the length of a word."""

Image.MAX_IMAGE_PIXELS = None  # the decoder's own limit is checked below, before any pixel is decoded

ImageTransform = Callable[[Image.Image], Tensor]


class Sample(NamedTuple):
    """A decoded, augmented sample."""

    key: str
    image: Tensor
    """uint8 [3, H, W]."""
    caption: str


class UnusableSample(Exception):
    """A permanent fault of one sample. ``reason`` is one of a few words, so that faults can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SampleDecoder:
    """Turns raw samples into samples with one transform; the randomness of each is keyed, not drawn in sequence."""

    def __init__(self, *, transform: ImageTransform, image_key: str, text_key: str, max_image_pixels: int) -> None:
        self.transform = transform
        self.image_extensions = tuple(image_key.lower().split(";"))
        self.text_extensions = tuple(text_key.lower().split(";"))
        self.max_image_pixels = max_image_pixels

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        """Decodes and augments; the same (raw, seed) always gives the same pixels.

        Raises:
            UnusableSample: with the reason ``no_image``, ``no_caption``, ``empty_caption``, ``caption_not_utf8``,
                ``caption_too_long``, ``image_too_large`` or ``broken_image``.
        """
        caption = decode_caption(first_member(raw, self.text_extensions, missing="no_caption"))
        image = decode_image(
            first_member(raw, self.image_extensions, missing="no_image"), max_pixels=self.max_image_pixels
        )
        with torch.random.fork_rng(devices=[]):
            state = random.getstate()
            # Not torch.manual_seed, which would also reset the GPUs' generators, where the model's dropout draws.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            try:
                return Sample(raw.key, self.transform(image), caption)
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
    if not caption.strip():
        raise UnusableSample("empty_caption")
    return caption


def decode_image(data: bytes, *, max_pixels: int = 0) -> Image.Image:
    """An RGB image; its size is checked from the header before anything is decoded (0: no limit)."""
    try:
        image = Image.open(io.BytesIO(data))
        if max_pixels and image.width * image.height > max_pixels:
            raise UnusableSample("image_too_large")
        return image.convert("RGB")
    except UnusableSample:
        raise
    except Exception as error:  # Pillow's plugins raise a dozen types for damaged files, SyntaxError among them
        raise UnusableSample("broken_image") from error
