"""FLOPs of training on one pair of image and caption, counted on tensors without memory: what MFU is made of.

    useful     image tower + each caption up to its end token, the last blocks where they are read, nothing twice
    computed   what our towers do on the packed batch: fillers, and captions attending in groups of about one length
    padded     what a tower without packing does: all captions of full context length, last blocks in full

Forward and backward pass; the matrix products of the loss are not in it. One multiply-accumulate is 2 FLOPs, causal
attention counts in full, and what checkpointing or flash attention computes twice is no use and counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model_facts import compute_last_blocks
from models.clip import Clip
from models.config_files import find_model
from models.factory import create_model
from models.packing import PackedTexts, pack_texts
from models.text_form import TextForm, choose_text_form

_LENGTHS = (8, 16, 32)
"""Of the captions that are counted. A caption's FLOPs are a polynomial of the second degree in its length: three
counts give it exactly."""


class TrainingFlops(NamedTuple):
    """Per pair, mean over a batch."""

    useful: float
    """The numerator of MFU."""
    computed: float
    padded: float
    """OpenCLIP's, whose own modules count the same."""


def training_flops_per_sample(
    model_name: str, lengths: Sequence[int], *, batch_size: int | None = None, **options: Any
) -> TrainingFlops:
    """Of a model on captions of these lengths; a few seconds, and no memory to speak of.

    Args:
        lengths: tokens of each caption up to its end token, that included.
        batch_size: how many captions are packed together; None: all of them.
        options: of ``create_model``: image size, patch dropout and the like.

    Raises:
        ValueError: a Hugging Face text tower, whose code looks at the values of its masks.
    """
    text_tower = find_model(model_name).model_cfg["text_cfg"].get("hf_model_name")
    if text_tower is not None:
        raise ValueError(f"'{text_tower}' of model '{model_name}' cannot be counted without memory; choose another")
    model, config, _ = create_model(model_name, device="meta", **options)
    form, context = choose_text_form(config)[0], config.text_cfg.context_length
    model.train()
    image = count_image(model, batch_size=1)
    full_text = count_texts(model, padded_texts(1, context))
    useful_text = Fraction(full_text) if form is TextForm.PADDED else _mean_text(model, lengths)
    computed_text = useful_text
    if form is TextForm.PACKED:
        starts = range(0, len(lengths), batch_size or len(lengths))
        batches = [pack_texts(ending_at(lengths[start:][:batch_size], context)) for start in starts]
        computed_text = Fraction(sum(count_texts(model, batch.to("meta")) for batch in batches), len(lengths))
    compute_last_blocks(model, whole=True)
    padded = count_image(model, batch_size=1) + count_texts(model, padded_texts(1, context))
    return TrainingFlops(float(image + useful_text), float(image + computed_text), float(padded))


def count_image(model: Clip, *, batch_size: int) -> int:
    """FLOPs of the image tower, forward and backward."""
    images = torch.empty(batch_size, 3, *model.config.vision_cfg.image_hw, device="meta")
    return count_flops(lambda: model.encode_image(images))


def count_texts(model: Clip, texts: Tensor | PackedTexts) -> int:
    """FLOPs of the text tower, forward and backward."""
    return count_flops(lambda: model.encode_text(texts))


def count_flops(forward: Callable[[], Tensor]) -> int:
    """Of a forward pass and the backward pass from its result."""
    with FlopCounterMode(display=False, custom_mapping=_CORRECTIONS) as counter:
        forward().sum().backward()
    return int(counter.get_total_flops())


def padded_texts(batch_size: int, length: int) -> Tensor:
    """int64 [B, L] on ``meta``: no values, so no lengths of captions either."""
    return torch.zeros(batch_size, length, dtype=torch.int64, device="meta")


def ending_at(lengths: Sequence[int], context_length: int) -> Tensor:
    """Captions of these lengths: int64 [B, L], on the host."""
    texts = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    texts[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 1  # the highest id ends a caption
    return texts


def _mean_text(model: Clip, lengths: Sequence[int]) -> Fraction:
    """FLOPs of the mean caption, none of them padded."""
    counts = [count_texts(model, padded_texts(1, length)) for length in _LENGTHS]
    return sum((_interpolate(counts, length) for length in lengths), Fraction(0)) / len(lengths)


def _interpolate(counts: Sequence[int], length: int) -> Fraction:
    """Lagrange's polynomial through the counts at ``_LENGTHS``."""
    total = Fraction(0)
    for place, count in zip(_LENGTHS, counts, strict=True):
        others = [other for other in _LENGTHS if other != place]
        total += count * Fraction(prod(length - other for other in others), prod(place - other for other in others))
    return total


def _convolution_backward(
    gradient: Sequence[int], _: Sequence[int], weight: Sequence[int], *rest: Any, **__: Any
) -> int:
    """Of weights and of inputs, each as much as forward. torch's own formula forgets the groups of a depthwise one."""
    wanted: Sequence[bool] = rest[-1]
    return 2 * prod(gradient) * prod(weight[1:]) * sum(wanted[:2])


_CORRECTIONS = {torch.ops.aten.convolution_backward: _convolution_backward}
