"""The pairwise sigmoid loss of SigLIP over the global batch, tile by tile.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from training.distributed.collectives import GatheredRows, gather_rows, rank
from training.losses.contrastive import at_least_float32, no_autocast
from training.losses.tiles import TILE_ELEMENTS, Tile, gradients, tiles


class SiglipLoss:
    """Every (image, text) pair is a yes/no question; the sum over the rank's B x G pairs, divided by B.

    Its mean over ranks is the sum over all G x G pairs divided by G, as in the paper. Only texts are gathered.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
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
            scale = at_least_float32(logit_scale)
            bias = torch.zeros_like(scale) if logit_bias is None else at_least_float32(logit_bias)
            images = at_least_float32(image_features)
            loss: Tensor = _TiledSigmoid.apply(images, texts, scale, bias, gathered, self.tile_elements)
        return loss


class _TiledSigmoid(torch.autograd.Function):
    """images [B, E], all texts [G, E], scale [], bias [] -> loss []."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        gathered: GatheredRows,
        tile_elements: int,
    ) -> Tensor:
        gathered.wait()
        first = rank() * len(images)
        total = images.new_zeros(())
        for tile in tiles(images, texts, first=first, elements=tile_elements):
            # Not softplus(x) - x for the pairs: at x = 20 that loses the whole gradient of a good pair in fp32.
            total -= F.logsigmoid(_answers(tile, scale, bias)).sum()
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.gathered, ctx.first, ctx.tile_elements = gathered, first, tile_elements
        return total / len(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        images, texts, scale, bias = ctx.saved_tensors

        def slopes(tile: Tile) -> Tensor:
            slope = torch.sigmoid_(_answers(tile, scale, bias).neg_())
            slope.diagonal(tile.diagonal).neg_()
            return slope

        found = gradients(images, texts, scale, first=ctx.first, elements=ctx.tile_elements, slopes=slopes)
        factor = grad / len(images)
        of_texts = found.texts.mul_(factor)
        ctx.gathered.begin_return(of_texts)
        return found.images.mul_(factor), of_texts, found.scale * factor, found.bias * factor, None, None


def _answers(tile: Tile, scale: Tensor, bias: Tensor) -> Tensor:
    """[B, C]: logits of the right answers: yes for pairs that belong together, else no. Overwrites the tile."""
    logits = tile.scores.mul_(scale).add_(bias).neg_()
    tile.pairs.neg_()
    return logits
