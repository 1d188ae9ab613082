"""Two towers and a temperature: images and texts to normalised features.

Shapes: B rank batch, L text tokens, E embedding.

State-dict layouts, both as in OpenCLIP (``custom_text`` of the configuration chooses):

    classic   visual.*   transformer.* token_embedding.* positional_embedding ln_final.* text_projection   logit_scale
    custom    visual.*   text.*                                                                            logit_scale
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ClipConfig, TextConfig
from models.packing import PackedTexts
from models.text_form import check_packable
from models.text_transformer import TextParts, encode_texts
from models.transformer import LayerNorm, Transformer


class ClipOutput(NamedTuple):
    """What the loss needs; everything is at least fp32, also under autocast."""

    image_features: Tensor
    """[B, E], L2-normalised."""
    text_features: Tensor
    """[B, E], L2-normalised."""
    logit_scale: Tensor
    """0-D; the exponential of the parameter of the same name."""
    logit_bias: Tensor | None
    """0-D, or None for models without one."""


class Clip(nn.Module):
    """A contrastive image-text model."""

    visual: nn.Module
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    # The parts of a TextParts; only set in the classic layout.
    text_config: TextConfig
    transformer: Transformer
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    ln_final: LayerNorm
    text_projection: nn.Parameter | nn.Linear | None

    def __init__(self, config: ClipConfig, *, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.context_length = config.text_cfg.context_length
        self.embed_dim = config.embed_dim
        self.visual = visual
        if config.custom_text:
            self.text = text
        else:
            self._adopt(cast(TextParts, text))
        shape = [1] if config.nonscalar_logit_scale else []
        self.logit_scale = nn.Parameter(torch.ones(shape) * config.init_logit_scale)
        self.logit_bias = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.ones(shape) * config.init_logit_bias)

    @property
    def image_blocks(self) -> list[nn.Module]:
        """The repeated blocks of the image tower; empty if it has none that we know of."""
        return list(cast("list[nn.Module]", getattr(self.visual, "blocks", [])))

    @property
    def text_blocks(self) -> list[nn.Module]:
        """The repeated blocks of the text tower, in either layout."""
        if self.config.custom_text:
            return list(cast("list[nn.Module]", getattr(self.text, "blocks", [])))
        return list(self.transformer.resblocks)

    def forward(
        self,
        images: Tensor,
        texts: Tensor | PackedTexts,
        on_text_features: Callable[[Tensor], None] | None = None,
    ) -> ClipOutput:
        """Encode a batch of pairs.

        Args:
            images: float [B, 3, H, W], normalised.
            texts: int64 [B, L] or packed.
            on_text_features: called with what ``text_features`` will be, graph included. Texts then come first, so that
                what is done with them can go on beside the image tower, the longer one.
        """
        if on_text_features is None:
            image_features = _normalized(self.visual(images))
            text_features = _normalized(self._text_features(texts))
        else:
            text_features = _normalized(self._text_features(texts))
            on_text_features(text_features)
            image_features = _normalized(self.visual(images))
        return ClipOutput(
            image_features=image_features,
            text_features=text_features,
            # New tensors, not views of parameters: whatever wraps the model puts its hooks on what comes out here.
            logit_scale=_full_precision(self.logit_scale).squeeze().exp(),  # [] or [1] -> []
            logit_bias=None if self.logit_bias is None else _full_precision(self.logit_bias).squeeze().clone(),
        )

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """[B, 3, H, W] -> [B, E]."""
        features: Tensor = self.visual(images)
        return _normalized(features) if normalize else features

    def encode_text(self, texts: Tensor | PackedTexts, normalize: bool = False) -> Tensor:
        """int64 [B, L] or packed -> [B, E].

        Raises:
            ValueError: packed texts, and a tower that needs the padding.
        """
        features = self._text_features(texts)
        return _normalized(features) if normalize else features

    def _text_features(self, texts: Tensor | PackedTexts) -> Tensor:
        if isinstance(texts, PackedTexts):
            check_packable(self.config)
        features: Tensor = self.text(texts) if self.config.custom_text else encode_texts(self, texts)
        return features

    def _adopt(self, text: TextParts) -> None:
        """Take over the parts of a text tower, in the order in which OpenCLIP registers them."""
        self.text_config = self.config.text_cfg
        self.transformer = text.transformer
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection


def _normalized(features: Tensor) -> Tensor:
    """[B, E] -> [B, E] of length 1, computed in at least fp32: bf16 has 8 bits, and the logits multiply by 100."""
    return F.normalize(_full_precision(features), dim=-1)


def _full_precision(tensor: Tensor) -> Tensor:
    """At least fp32; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
