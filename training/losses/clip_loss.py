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

from training.distributed.collectives import GatheredRows, WayBack, all_reduce_log_sum_exp, rank
from training.losses.contrastive import Loss
from training.losses.tiles import Tile, gradients, tiles


class ClipLoss(Loss):
    """Symmetric cross-entropy: each image picks its text out of the global batch, each text its image.

    Returns the share of the rank's own images and texts; the mean over ranks is the loss of the global batch. The
    largest thing it keeps is the gathered texts.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """

    def _compare(self, images: Tensor, texts: GatheredRows, scale: Tensor, bias: Tensor | None) -> Tensor:
        # A softmax does not see a bias, but a model that has one needs it in the graph: DDP waits for its gradient,
        # which is zero.
        loss: Tensor = _TiledSoftmax.apply(
            images, texts.anchor, scale, bias, texts.take(), texts.way_back, self.tile_elements
        )
        return loss


class _TiledSoftmax(torch.autograd.Function):
    """images [B, E], anchor of the texts [], scale [], bias [] or None, all texts [G, E] -> loss []."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        anchor: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        texts: Tensor,
        way_back: WayBack,
        tile_elements: int,
    ) -> Tensor:
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
        ctx.has_bias, ctx.way_back, ctx.first, ctx.tile_elements = bias is not None, way_back, first, tile_elements
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

        found = gradients(
            images,
            texts,
            scale,
            first=ctx.first,
            elements=ctx.tile_elements,
            slopes=slopes,
            of_texts_wanted=ctx.needs_input_grad[1],
        )
        factor = grad / (2 * len(images))
        if found.texts is not None:
            ctx.way_back.begin(found.texts.mul_(factor))
        of_bias = torch.zeros_like(scale) if ctx.has_bias else None
        return found.images.mul_(factor), None, found.scale * factor, of_bias, None, None, None
