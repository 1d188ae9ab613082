"""A model as evaluation sees it: uint8 images or tokens in, normalised fp32 features out.

B images, n texts, L text tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.config import PreprocessConfig
from training.data.batch import normalize


class TwoTowers(Protocol):
    """The part of a CLIP model that evaluation uses (ours and OpenCLIP's both have it)."""

    logit_scale: Tensor
    """The logarithm, as the parameter stores it."""

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor: ...

    def encode_text(self, texts: Tensor, normalize: bool) -> Tensor: ...


@dataclass(frozen=True)
class Encoder:
    """Runs the towers in the run's precision. Features leave in fp32, and everything after them is computed in fp32."""

    model: TwoTowers
    preprocess: PreprocessConfig
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    input_dtype: torch.dtype = torch.float32

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> fp32 [B, E], normalised."""
        on_device = images.to(self.device, non_blocking=True)
        pixels = normalize(on_device, mean=self.preprocess.mean, std=self.preprocess.std, dtype=self.input_dtype)
        with self.autocast():
            features = self.model.encode_image(pixels, normalize=True)
        return features.float()

    def texts(self, tokens: Tensor) -> Tensor:
        """int64 [n, L] -> fp32 [n, E], normalised."""
        with self.autocast():
            features = self.model.encode_text(tokens.to(self.device, non_blocking=True), normalize=True)
        return features.float()

    def logit_scale(self) -> Tensor:
        """The factor on cosines, 0-D fp32."""
        return self.model.logit_scale.detach().float().exp()
