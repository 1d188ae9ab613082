"""What the contrastive losses share: their signature and the precision they are computed in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Loss(Protocol):
    """A contrastive loss of the rank's features, aware of the other ranks' features.

    The mean of the returned value over ranks is the loss of the global batch, and gradients averaged over ranks
    (as DDP does) are the gradient of that mean. Every rank must call it, and call backward on the result.
    """

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> Tensor:
        """Features [B, E], L2-normalised; logit_scale is the exponential, 0-D; returns a 0-D tensor, fp32 or wider."""
        ...


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision to fp32 and keeps fp32 and fp64.

    At scale 100 a bf16 logit resolves 0.5, which is several per cent of the gradient; fp32 costs next to nothing here.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would round the logits to half precision again."""
    return torch.autocast(tensor.device.type, enabled=False)
