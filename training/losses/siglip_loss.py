"""The pairwise sigmoid loss of SigLIP over the global batch, tile by tile.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from training.distributed.collectives import GatheredRows, WayBack, rank
from training.losses.contrastive import Loss
from training.losses.tiles import Tile, gradients, tiles


class SiglipLoss(Loss):
    """Every (image, text) pair is a yes/no question; the sum over the rank's B x G pairs, divided by B.

    Its mean over ranks is the sum over all G x G pairs divided by G, as in the paper. Only texts are gathered.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
    """

    def _compare(self, images: Tensor, texts: GatheredRows, scale: Tensor, bias: Tensor | None) -> Tensor:
        bias = torch.zeros_like(scale) if bias is None else bias
        loss: Tensor = _TiledSigmoid.apply(
            images, texts.anchor, scale, bias, texts.take(), texts.way_back, self.tile_elements
        )
        return loss


class _TiledSigmoid(torch.autograd.Function):
    """images [B, E], anchor of the texts [], scale [], bias [], all texts [G, E] -> loss []."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        anchor: Tensor,
        scale: Tensor,
        bias: Tensor,
        texts: Tensor,
        way_back: WayBack,
        tile_elements: int,
    ) -> Tensor:
        first = rank() * len(images)
        total = images.new_zeros(())
        for tile in tiles(images, texts, first=first, elements=tile_elements):
            # Not softplus(x) - x for the pairs: at x = 20 that loses the whole gradient of a good pair in fp32.
            total -= F.logsigmoid(_answers(tile, scale, bias)).sum()
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.way_back, ctx.first, ctx.tile_elements = way_back, first, tile_elements
        return total / len(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        images, texts, scale, bias = ctx.saved_tensors

        def slopes(tile: Tile) -> Tensor:
            slope = torch.sigmoid_(_answers(tile, scale, bias).neg_())
            slope.diagonal(tile.diagonal).neg_()
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
        factor = grad / len(images)
        if found.texts is not None:
            ctx.way_back.begin(found.texts.mul_(factor))
        return found.images.mul_(factor), None, found.scale * factor, found.bias * factor, None, None, None


def _answers(tile: Tile, scale: Tensor, bias: Tensor) -> Tensor:
    """[B, C]: logits of the right answers: yes for pairs that belong together, else no. Overwrites the tile."""
    logits = tile.scores.mul_(scale).add_(bias).neg_()
    tile.pairs.neg_()
    return logits
