"""The text tower of CLIP: token ids to text features.

Shapes: B rank batch, L text tokens, V vocabulary, D width, E embedding.

    texts int64 [B, L] -> tokens [B, L, D] -> blocks -> pooled [B, D] -> features [B, E]
    packed texts       -> tokens    [T, D] -> blocks -> pooled [C, D] -> features [B, E]

Packed, T is the number of tokens of all captions and C of captions, filler included (``models/packing.py``).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import TextConfig
from models.packing import PackedTexts
from models.transformer import BlockOptions, LayerNorm, Read, ResidualAttentionBlock, Transformer, tokens_at


class TextParts(Protocol):
    """Whatever holds the parts of a text tower.

    Two things do: TextTransformer, and Clip itself in OpenCLIP's classic layout, where the parts are its own
    attributes because checkpoints name them without a ``text.`` prefix.
    """

    text_config: TextConfig
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: LayerNorm
    text_projection: nn.Parameter | nn.Linear | None


def encode_texts(parts: TextParts, texts: Tensor | PackedTexts) -> Tensor:
    """int64 [B, L] or packed -> [B, E], not normalised.

    Raises:
        ValueError: L is longer than the context length.
    """
    config = parts.text_config
    length = texts.context_length if isinstance(texts, PackedTexts) else texts.shape[1]
    if length > config.context_length:
        raise ValueError(
            f"texts are {length} tokens long, the model's context length is {config.context_length}: "
            f"truncate them, or build it with --force-context-length {length}"
        )
    pooled: Tensor = _pool_packed(parts, texts) if isinstance(texts, PackedTexts) else _pool_padded(parts, texts)
    # The norm acts per token, so only the pooled one needs it.
    pooled = parts.ln_final(pooled)  # [B, D]
    projection = parts.text_projection
    if projection is not None:
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection  # [B, D] -> [B, E]
    return pooled


def _pool_padded(parts: TextParts, texts: Tensor) -> Tensor:
    """int64 [B, L] -> [B, D]."""
    dtype = _stream_dtype(parts)
    tokens = parts.token_embedding(texts).to(dtype)  # [B, L] -> [B, L, D]
    tokens = tokens + parts.positional_embedding[: texts.shape[1]].to(dtype)
    read = pooled_place(texts, config=parts.text_config)
    if isinstance(parts.transformer, Transformer):
        pooled: Tensor = parts.transformer(tokens, read=read)
        return pooled
    return tokens_at(parts.transformer(tokens), read)  # blocks of open_clip's


def _pool_packed(parts: TextParts, texts: PackedTexts) -> Tensor:
    """Packed -> [B, D]."""
    dtype = _stream_dtype(parts)
    tokens = parts.token_embedding(texts.tokens).to(dtype)  # [T] -> [T, D]
    # A lookup and not an index: its backward pass sums the rows in a fixed order on every device.
    tokens = tokens + F.embedding(texts.positions, parts.positional_embedding).to(dtype)
    packing = texts.packing
    pooled: Tensor = parts.transformer(tokens, packing, packing.ends)  # [T, D] -> [C, D]
    return pooled[: texts.num_texts]


def _stream_dtype(parts: TextParts) -> torch.dtype:
    """Of the residual stream: the low-precision modes keep embeddings in fp32, and it has that of the blocks' weights.

    Under autocast it keeps that of the embeddings: a block's weights may be copies in lower precision then (FSDP).
    """
    embedding = parts.token_embedding.weight
    device = embedding.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not for meta
        return embedding.dtype
    return parts.transformer.get_parameter("resblocks.0.mlp.c_fc.weight").dtype


def pooled_place(texts: Tensor, *, config: TextConfig) -> Read:
    """int64 [B, L] -> the place of the token that stands for the whole text.

    ``argmax`` takes the highest id, which is the end-of-text token of OpenAI's vocabulary.
    """
    if config.pool_type == "first":
        return 0
    if config.pool_type == "last":
        return texts.shape[1] - 1
    return (texts if config.pool_type == "argmax" else (texts == config.eos_id).int()).argmax(dim=-1)


class TextTransformer(nn.Module):
    """Token ids to text features."""

    text_projection: nn.Parameter | nn.Linear | None

    def __init__(self, config: TextConfig, *, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        self.text_config = config
        options = BlockOptions(
            width=config.width,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            causal=not config.no_causal_mask,
            ls_init_value=config.ls_init_value,
            quick_gelu=quick_gelu,
            act_kwargs=config.act_kwargs,
            norm_kwargs=config.norm_kwargs,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(options, layers=config.layers)
        self.ln_final = options.norm()
        if config.proj_type == "none":
            self.text_projection = None
        elif config.proj_bias:
            self.text_projection = nn.Linear(config.width, embed_dim)
        else:
            self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._init_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        """The residual blocks, for activation checkpointing and compilation from outside."""
        return self.transformer.resblocks

    def forward(self, texts: Tensor | PackedTexts) -> Tensor:
        """int64 [B, L] or packed -> [B, E], not normalised."""
        return encode_texts(self, texts)

    def _init_weights(self) -> None:
        """OpenAI's initialisation of the text tower, drawn in OpenCLIP's order; biases keep PyTorch's defaults."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        width, layers = self.ln_final.normalized_shape[0], len(self.transformer.resblocks)
        width_std = width**-0.5
        # The residual stream sums 2 * layers branches; their outputs are scaled so that its variance stays put.
        branch_std = width_std * (2 * layers) ** -0.5
        for block in cast("list[ResidualAttentionBlock]", self.transformer.resblocks):
            nn.init.normal_(block.attn.in_proj_weight, std=width_std)
            nn.init.normal_(block.attn.out_proj.weight, std=branch_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=branch_std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width_std)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width_std)
