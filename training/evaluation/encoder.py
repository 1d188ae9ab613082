"""A model as evaluation sees it: uint8 images or tokens in, normalised fp32 features out.

B images, n texts, L text tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.config import PreprocessConfig
from training.data.batch import normalize
from training.distributed.collectives import all_reduce_sum


class TwoTowers(Protocol):
    """The part of a CLIP model that evaluation uses (ours and OpenCLIP's both have it)."""

    logit_scale: Tensor
    """The logarithm, as the parameter stores it."""
    context_length: int

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

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around everything between two collectives in which ranks call ``images`` and ``texts``, each as it needs."""
        yield

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> fp32 [B, E], normalised."""
        on_device = images.to(self.device, non_blocking=True)
        pixels = normalize(on_device, mean=self.preprocess.mean, std=self.preprocess.std, dtype=self.input_dtype)
        return self._encode_images(pixels)

    def texts(self, tokens: Tensor) -> Tensor:
        """int64 [n, L] -> fp32 [n, E], normalised."""
        return self._encode_texts(tokens.to(self.device, non_blocking=True))

    def logit_scale(self) -> Tensor:
        """The factor on cosines, 0-D fp32."""
        return self.model.logit_scale.detach().float().exp()

    def _encode_images(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encode_image(pixels, normalize=True).float()

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encode_text(tokens, normalize=True).float()


@dataclass(frozen=True)
class ShardedEncoder(Encoder):
    """The same for a model that is spread over the ranks: each of its forward passes is a collective of all of them.

    Ranks have different numbers of batches. So before every pass they add up who needs which tower next, and who needs
    nothing runs along with a blank sample. Batches stay as they are, and so do their features.

        needs images, texts     rank 0   1 0   1 0   0 1   0 0
                                rank 1   1 0   0 1   0 0   0 0   nobody needs anything: all go on
        towers that run                  image both  text  none
    """

    @contextmanager
    def in_step(self) -> Iterator[None]:
        # Not in a ``finally``: a rank that fails ends the others, it does not accompany them.
        yield
        while self._run_needed(None, None) is not None:
            pass

    def _encode_images(self, pixels: Tensor) -> Tensor:
        features = self._run_needed(pixels, None)
        assert features is not None
        return features[0]

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        features = self._run_needed(None, tokens)
        assert features is not None
        return features[1]

    def _run_needed(self, pixels: Tensor | None, tokens: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Features (empty from a tower that did not run); None if no rank needs any. Collective: all ranks."""
        needs = torch.tensor([pixels is not None, tokens is not None], dtype=torch.int32, device=self.device)
        needs_images, needs_texts = all_reduce_sum(needs).tolist()  # collective: all ranks, host sync
        if not needs_images and not needs_texts:
            return None
        images = texts = torch.empty(0, device=self.device)
        if needs_images:
            images = super()._encode_images(self._blank_image() if pixels is None else pixels)  # collective: all ranks
        if needs_texts:
            texts = super()._encode_texts(self._blank_text() if tokens is None else tokens)  # collective: all ranks
        return images, texts

    def _blank_image(self) -> Tensor:
        return torch.zeros(1, 3, *self.preprocess.size, dtype=self.input_dtype, device=self.device)

    def _blank_text(self) -> Tensor:
        return torch.zeros(1, self.model.context_length, dtype=torch.int64, device=self.device)
