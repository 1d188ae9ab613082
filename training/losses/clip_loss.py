"""The softmax contrastive loss of CLIP over the global batch.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distributed.collectives import all_gather_with_grad, rank
from training.losses.contrastive import at_least_float32, no_autocast


class ClipLoss:
    """Symmetric cross-entropy: each image picks its text out of the global batch, each text its image.

    ``local`` computes the rank's B rows of the two [G, G] problems, otherwise every rank computes all G rows. Both
    have the same gradient; the local form needs 1/W of the memory and returns the rank's share of the loss.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """

    def __init__(self, *, local: bool) -> None:
        self.local = local

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        with no_autocast(image_features):
            images, texts = at_least_float32(image_features), at_least_float32(text_features)
            # One collective for both towers: half the latency, and half again in the backward pass.
            gathered = all_gather_with_grad(torch.cat([images, texts], dim=1))  # [B, 2E] -> [G, 2E]
            all_images, all_texts = gathered.chunk(2, dim=1)  # 2 x [G, E]
            first_row = rank() * images.shape[0] if self.local else 0
            if not self.local:
                images, texts = all_images, all_texts  # R = B rows when local, G otherwise
            scale, bias = _scalars(logit_scale, logit_bias)
            logits_per_image = scale * images @ all_texts.T + bias  # [R, E] x [E, G] -> [R, G]
            logits_per_text = scale * texts @ all_images.T + bias if self.local else logits_per_image.T
            labels = torch.arange(first_row, first_row + images.shape[0], device=images.device)
            return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def _scalars(logit_scale: Tensor, logit_bias: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """A softmax does not see a bias, but a model that has one needs it in the graph: DDP waits for its gradient (0)."""
    return at_least_float32(logit_scale), 0.0 if logit_bias is None else at_least_float32(logit_bias)
