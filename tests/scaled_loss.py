"""A loss times a number, for tests in which the loss goes wrong."""

from __future__ import annotations

from torch import Tensor

from training.distributed.collectives import GatheredRows
from training.losses import Loss


class ScaledLoss(Loss):
    """Another loss's values, multiplied; what it gathers is the other's as well."""

    def __init__(self, loss: Loss, factor: float) -> None:
        super().__init__()
        self._loss = loss
        self._factor = factor

    def begin(self, text_features: Tensor) -> GatheredRows:
        return self._loss.begin(text_features)

    def _compare(self, images: Tensor, texts: GatheredRows, scale: Tensor, bias: Tensor | None) -> Tensor:
        return self._loss._compare(images, texts, scale, bias) * self._factor
