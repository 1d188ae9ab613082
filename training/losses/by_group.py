"""A contrastive loss measured by groups of rows, to see which source of data is hard or broken. No gradient.

Legend: B rank batch, E embedding, S groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses.contrastive import at_least_float32, no_autocast


@torch.no_grad()
def losses_by_group(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, groups: Tensor, *, num_groups: int
) -> Tensor:
    """[S, 2]: the sum of the rows' softmax losses and the number of rows, by group. Fewer negatives than in training.

    Args:
        image_features: [B, E], L2-normalised, of this rank; ``text_features`` likewise.
        groups: int64 [B], each below ``num_groups``.
    """
    with no_autocast(image_features):
        logits = logit_scale * at_least_float32(image_features) @ at_least_float32(text_features).T  # [B, B]
        labels = torch.arange(len(logits), device=logits.device)
        by_image = F.cross_entropy(logits, labels, reduction="none")
        by_text = F.cross_entropy(logits.T, labels, reduction="none")
        rows = torch.stack([(by_image + by_text) / 2, torch.ones_like(by_image)], dim=1)  # [B, 2]
        return rows.new_zeros(num_groups, 2).index_add_(0, groups, rows)
