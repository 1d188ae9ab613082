"""What the contrastive losses share: their signature, how they gather texts, and the precision they are computed in."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from training.distributed.collectives import GatheredRows, gather_rows
from training.losses.tiles import TILE_ELEMENTS


class Loss(ABC):
    """A contrastive loss of the rank's features, aware of the other ranks' features.

    The mean of the returned value over ranks is the loss of the global batch, and gradients averaged over ranks
    (as DDP does) are the gradient of that mean. Every rank must call it, and call backward on the result.
    """

    def __init__(self, *, tile_elements: int = TILE_ELEMENTS, gather_dtype: torch.dtype | None = None) -> None:
        """
        Args:
            tile_elements: logits in memory at a time.
            gather_dtype: what texts are rounded to for the network; None does not round.
        """
        self.tile_elements = tile_elements
        self.gather_dtype = gather_dtype

    def begin(self, text_features: Tensor) -> GatheredRows:
        """Starts to gather the texts, which fly while the images are encoded: what comes back is for ``__call__``.

        Collective: in the same place among all collectives on every rank.
        """
        with no_autocast(text_features):
            return gather_rows(at_least_float32(text_features), dtype=self.gather_dtype)

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        texts: GatheredRows | None = None,
    ) -> Tensor:
        """A 0-D tensor, fp32 or wider.

        Args:
            image_features: [B, E], L2-normalised; ``text_features`` likewise.
            logit_scale: 0-D, the exponential.
            texts: what ``begin`` returned for these text features; None begins now.
        """
        with no_autocast(image_features):
            return self._compare(
                at_least_float32(image_features),
                self.begin(text_features) if texts is None else texts,
                at_least_float32(logit_scale),
                None if logit_bias is None else at_least_float32(logit_bias),
            )

    @abstractmethod
    def _compare(self, images: Tensor, texts: GatheredRows, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Images [B, E] with all texts [G, E]."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision to fp32 and keeps fp32 and fp64.

    At scale 100 a bf16 logit resolves 0.5, which is several per cent of the gradient; fp32 costs next to nothing here.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast would round the logits to half precision again."""
    return torch.autocast(tensor.device.type, enabled=False)
