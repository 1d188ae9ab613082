"""A small two-tower model with the contract of ``models.clip.Clip``, for tests of the step and the wrappers.

Real modules with what is hard about big ones: dropout, BatchNorm on request, a bias on request, repeated blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip import ClipOutput
from training.data.batch import DeviceBatch

IMAGE_SHAPE = (3, 4, 4)
VOCABULARY, TOKENS, WIDTH, EMBEDDING = 50, 6, 16, 12


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.gelu(self.fc(self.ln(x))))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)  # [B, L, D] -> [B, D]


class Tower(nn.Module):
    def __init__(self, stem: nn.Module, *, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.stem = stem
        self.bn = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.proj = nn.Linear(WIDTH, EMBEDDING, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.proj(x)


class TinyClip(nn.Module):
    embed_dim = EMBEDDING

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        image_stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(IMAGE_SHAPE), WIDTH))
        text_stem = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Mean())
        self.visual = Tower(image_stem, dropout=dropout, batch_norm=batch_norm)
        self.text = Tower(text_stem, dropout=dropout, batch_norm=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0 if bias else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if bias else None

    @property
    def image_blocks(self) -> list[nn.Module]:
        return list(self.visual.blocks)

    @property
    def text_blocks(self) -> list[nn.Module]:
        return list(self.text.blocks)

    def forward(
        self, images: Tensor, texts: Tensor, on_text_features: Callable[[Tensor], None] | None = None
    ) -> ClipOutput:
        text_features = _normalized(self.text(texts))
        if on_text_features is not None:
            on_text_features(text_features)
        return ClipOutput(
            image_features=_normalized(self.visual(images)),
            text_features=text_features,
            logit_scale=self.logit_scale.exp(),
            logit_bias=None if self.logit_bias is None else self.logit_bias + 0,
        )


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def tiny_clip(*, seed: int = 0, dropout: float = 0.0, batch_norm: bool = False, bias: bool = False) -> TinyClip:
    """The same weights for the same seed, on every rank."""
    torch.manual_seed(seed)
    return TinyClip(dropout=dropout, batch_norm=batch_norm, bias=bias)


def tiny_batch(size: int, *, seed: int = 1) -> DeviceBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *IMAGE_SHAPE, generator=generator)
    return DeviceBatch(images, torch.randint(VOCABULARY, (size, TOKENS), generator=generator))


def split(batch: DeviceBatch, pieces: int) -> list[DeviceBatch]:
    """Equal pieces in order: the parts of ranks or of micro-steps."""
    images, texts = batch.images.chunk(pieces), batch.texts.chunk(pieces)
    return [DeviceBatch(*piece) for piece in zip(images, texts, strict=True)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient by parameter name; a trained parameter without one is an error."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.detach().clone()
    return found
