"""The pairwise sigmoid loss of SigLIP over the global batch.

Legend: B rank batch, G global batch, E embedding, C columns of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.distributed.collectives import all_gather_with_grad, rank
from training.losses.contrastive import at_least_float32, no_autocast

CHUNK_COLUMNS = 8192
"""Texts scored at a time: [B, C] in fp32 is 32 MB for B = 1024, whatever the global batch."""


class SiglipLoss:
    """Every (image, text) pair is a yes/no question; the sum over the rank's B x G pairs, divided by B.

    Its mean over ranks is the sum over all G x G pairs divided by G, as in the paper. Only texts are gathered.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.
    """

    def __init__(self, *, chunk_columns: int = CHUNK_COLUMNS) -> None:
        self.chunk_columns = chunk_columns

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        with no_autocast(image_features):
            images = at_least_float32(image_features)
            all_texts = all_gather_with_grad(at_least_float32(text_features))  # [B, E] -> [G, E]
            scale = at_least_float32(logit_scale)
            bias = torch.zeros_like(scale) if logit_bias is None else at_least_float32(logit_bias)
            diagonal = rank() * images.shape[0]  # column of the first image's own text
            total = images.new_zeros(())
            for start in range(0, all_texts.shape[0], self.chunk_columns):
                texts = all_texts[start : start + self.chunk_columns]  # [C, E]
                total = total + self._chunk(images, texts, scale, bias, diagonal - start)
            return total / images.shape[0]

    def _chunk(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, diagonal: int) -> Tensor:
        if texts.shape[0] < self.chunk_columns:  # one chunk only: nothing to save by computing it twice
            return _pair_losses(images, texts, scale, bias, diagonal)
        # Recomputed in the backward pass, so that the logits of one chunk exist at a time instead of all.
        return checkpoint(
            _pair_losses, images, texts, scale, bias, diagonal, use_reentrant=False, preserve_rng_state=False
        )


def _pair_losses(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, diagonal: int) -> Tensor:
    """Summed loss of [B, C] pairs; image i belongs to text i + diagonal, which may lie outside this chunk."""
    logits = scale * images @ texts.T + bias  # [B, E] x [E, C] -> [B, C]
    rows = torch.arange(images.shape[0], device=images.device)
    columns = torch.arange(texts.shape[0], device=images.device)
    is_pair = rows[:, None] + diagonal == columns[None, :]  # [B, C] bool
    # Not softplus(x) - x for the pairs: at x = 20 that loses the whole gradient of a good pair in fp32.
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum()
