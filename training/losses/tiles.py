"""Scores of B images against G texts, tile by tile: what both losses need, without ever holding B x G numbers.

    images [B, E], texts [G, E] -> for each tile of C texts: scores [B, C] -> summed up, forgotten

The backward pass computes each tile again: one matrix product more, and memory does not grow with the global batch.
Legend: B rank batch, G global batch, E embedding, C texts of one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ELEMENTS = 2**23
"""Scores that exist at a time: 32 MiB in fp32 fit into the cache of a large GPU, and are enough to keep it busy."""


class Tile(NamedTuple):
    """Some columns of the scores."""

    columns: slice
    """Which texts."""
    texts: Tensor
    """[C, E], in the type of the images."""
    scores: Tensor
    """[B, C] cosines, before temperature and bias; the caller may overwrite them."""
    diagonal: int
    """Column in this tile of the first image's own text; it may lie outside."""

    @property
    def pairs(self) -> Tensor:
        """The scores of those pairs that belong together and lie in this tile: a view [<= B] to read or to change."""
        return self.scores.diagonal(self.diagonal)


def tiles(images: Tensor, texts: Tensor, *, first: int, elements: int = TILE_ELEMENTS) -> Iterator[Tile]:
    """Scores of all texts, tile by tile.

    Args:
        images: [B, E].
        texts: [G, E]; in a lower precision they are raised tile by tile, and stay as small as they came.
        first: column of the first image's own text; the others follow.
        elements: scores in one tile, at least one column of them.
    """
    is_raised = texts.dtype != images.dtype
    # Raised texts of a tile take memory as well: they are to be no more than its scores.
    width = max(1, elements // max(1, len(images), images.shape[1] if is_raised else 1))
    for start in range(0, len(texts), width):
        some = texts[start : start + width].to(images.dtype)
        yield Tile(slice(start, start + len(some)), some, images @ some.T, first - start)


class Gradients(NamedTuple):
    """Of a loss, with respect to what ``tiles`` was given and to the two scalars."""

    images: Tensor
    """[B, E]."""
    texts: Tensor | None
    """[G, E]: what this rank's images ask of all texts; None if nobody wants to know."""
    scale: Tensor
    bias: Tensor


def gradients(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    first: int,
    elements: int,
    slopes: Callable[[Tile], Tensor],
    of_texts_wanted: bool,
) -> Gradients:
    """Gradients of a loss that is a sum over scaled scores.

    Args:
        slopes: of a tile: [B, C], the loss's derivative with respect to each logit (scale * score + bias).
        of_texts_wanted: False for a frozen text tower: one matrix product in three less.
    """
    of_images = torch.zeros_like(images)
    of_texts = images.new_empty(texts.shape) if of_texts_wanted else None
    of_bias = torch.zeros_like(scale)
    for tile in tiles(images, texts, first=first, elements=elements):
        slope = slopes(tile)
        of_images.addmm_(slope, tile.texts)  # [B, C] x [C, E]
        if of_texts is not None:
            torch.mm(slope.T, images, out=of_texts[tile.columns])  # [C, B] x [B, E]
        of_bias += slope.sum()
    # The sum over all pairs of slope * score, without going through the pairs again.
    of_scale = (of_images * images).sum()
    if of_texts is not None:
        of_texts.mul_(scale)
    return Gradients(of_images.mul_(scale), of_texts, of_scale, of_bias)
