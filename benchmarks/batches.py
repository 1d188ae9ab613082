"""Batches for measurements: random uint8 images, and captions as long as web alt-texts are.

Legend: B batch, L text tokens, H and W image height and width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS_FILE = Path(__file__).with_name("caption_lengths.json")
CLIP_VOCABULARY = 49_408


class HostBatch(NamedTuple):
    """What a loader would hand over: images uint8 [B,3,H,W], texts int64 [B,L]."""

    images: Tensor
    texts: Tensor


def caption_lengths(count: int, *, context_length: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` lengths, start and end tokens included, from the recorded histogram: int64 [count].

    One from each of ``count`` equal parts of the distribution: also a small batch has its mean, not one of chance.
    """
    histogram = json.loads(LENGTHS_FILE.read_text())["histogram"]
    lengths = torch.tensor([int(length) for length in histogram])
    shares = torch.tensor([float(number) for number in histogram.values()], dtype=torch.double).cumsum(0)
    places = (torch.arange(count) + torch.rand(count, generator=generator).double()) / count
    drawn = lengths[torch.searchsorted(shares / shares[-1], places)]
    return drawn[torch.randperm(count, generator=generator)].clamp(max=context_length)


def caption_tokens(lengths: Tensor, *, context_length: int, generator: torch.Generator) -> Tensor:
    """Captions of random words: start token, words, end token (the largest id), zeros: int64 [B, L]."""
    start, end = CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1
    words = torch.randint(1, start, (len(lengths), context_length), generator=generator)  # [B, L]
    position = torch.arange(context_length).expand_as(words)
    last = (lengths - 1)[:, None]  # [B, 1]
    texts = torch.where(position < last, words, 0)
    texts = torch.where(position == last, end, texts)
    texts[:, 0] = start
    return texts


def make_batches(
    count: int, *, batch_size: int, image_size: tuple[int, int], context_length: int, full_length: bool, seed: int
) -> list[HostBatch]:
    """``count`` different batches; ``full_length`` makes every caption as long as the context."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        images = torch.randint(0, 256, (batch_size, 3, *image_size), dtype=torch.uint8, generator=generator)
        lengths = caption_lengths(batch_size, context_length=context_length, generator=generator)
        if full_length:
            lengths = torch.full_like(lengths, context_length)
        batches.append(HostBatch(images, caption_tokens(lengths, context_length=context_length, generator=generator)))
    return batches


def real_lengths(batches: Sequence[HostBatch]) -> list[int]:
    """Tokens of every caption."""
    return [int(length) for batch in batches for length in (batch.texts != 0).sum(dim=1)]


def describe_captions(batches: Sequence[HostBatch]) -> dict[str, float]:
    """Mean, median and 99th percentile of the tokens per caption in these batches."""
    lengths = torch.tensor(real_lengths(batches), dtype=torch.double)
    quantiles = torch.quantile(lengths, torch.tensor([0.5, 0.99], dtype=torch.double))
    return {"mean": lengths.mean().item(), "median": quantiles[0].item(), "p99": quantiles[1].item()}
