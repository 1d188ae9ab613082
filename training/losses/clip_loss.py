"""The softmax contrastive loss of CLIP over the global batch, every logit computed by one rank only.

    rank r:  its images [B, E] x all texts [G, E] -> tiles of scores -> sums over its rows, partial sums over columns
    all:     partial sums of columns -> sums of columns [G]          2 numbers per text go over the network
    rank r:  loss of its B images and of its B texts

A column's softmax runs over images of all ranks. Its normaliser is all that a rank has to be told about the others'
images, so only texts are gathered: half the traffic and half the products of the form that gathers both.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.distributed.collectives import GatheredRows, all_reduce_log_sum_exp, gather_rows, rank
from training.losses.contrastive import at_least_float32, no_autocast
from training.losses.tiles import TILE_ELEMENTS, Tile, gradients, tiles


class ClipLoss:
    """Symmetric cross-entropy: each image picks its text out of the global batch, each text its image.

    Returns the share of the rank's own images and texts; the mean over ranks is the loss of the global batch. The
    largest thing it keeps is the gathered texts.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """

    def __init__(self, *, tile_elements: int = TILE_ELEMENTS) -> None:
        """
        Args:
            tile_elements: logits in memory at a time.
        """
        self.tile_elements = tile_elements

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        with no_autocast(image_features):
            texts, gathered = gather_rows(at_least_float32(text_features))
            loss: Tensor = _TiledSoftmax.apply(
                at_least_float32(image_features),
                texts,
                at_least_float32(logit_scale),
                # A softmax does not see a bias, but a model that has one needs it in the graph: DDP waits for its
                # gradient, which is zero.
                None if logit_bias is None else at_least_float32(logit_bias),
                gathered,
                self.tile_elements,
            )
        return loss


class _TiledSoftmax(torch.autograd.Function):
    """images [B, E], all texts [G, E], scale [], bias [] or None -> loss []."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        gathered: GatheredRows,
        tile_elements: int,
    ) -> Tensor:
        gathered.wait()
        count = len(images)
        first = rank() * count
        rows = images.new_full((count,), -torch.inf)  # log of the sum of exponentials along each row
        columns = images.new_empty(len(texts))
        pairs = images.new_empty(count)
        for tile in tiles(images, texts, first=first, elements=tile_elements):
            own = tile.pairs
            if len(own):
                pairs[max(0, -tile.diagonal) :][: len(own)] = scale * own
            logits = tile.scores.mul_(scale)
            rows = torch.logaddexp(rows, logits.logsumexp(dim=1))
            columns[tile.columns] = logits.logsumexp(dim=0)
        columns = all_reduce_log_sum_exp(columns)  # collective: all ranks
        ctx.save_for_backward(images, texts, scale, rows, columns)
        ctx.has_bias, ctx.gathered, ctx.first, ctx.tile_elements = bias is not None, gathered, first, tile_elements
        return ((rows - pairs).mean() + (columns[first : first + count] - pairs).mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        images, texts, scale, rows, columns = ctx.saved_tensors

        def slopes(tile: Tile) -> Tensor:
            """Both softmaxes, less one where a pair belongs together; over twice the batch."""
            logits = tile.scores.mul_(scale)
            slope = torch.exp(logits - rows[:, None])
            slope += torch.exp(logits - columns[tile.columns])
            own = tile.pairs  # logits by now
            if len(own):
                start = max(0, -tile.diagonal)
                of_rows, of_columns = rows[start:][: len(own)], columns[ctx.first + start :][: len(own)]
                # exp(x) - 1 near zero: what a well-matched pair still has to learn would be rounded away.
                slope.diagonal(tile.diagonal).copy_(torch.expm1(own - of_rows) + torch.expm1(own - of_columns))
            return slope

        found = gradients(images, texts, scale, first=ctx.first, elements=ctx.tile_elements, slopes=slopes)
        factor = grad / (2 * len(images))
        of_texts = found.texts.mul_(factor)
        ctx.gathered.begin_return(of_texts)
        of_bias = torch.zeros_like(scale) if ctx.has_bias else None
        return found.images.mul_(factor), of_texts, found.scale * factor, of_bias, None, None
