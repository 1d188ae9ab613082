"""The transformer shared by both towers: attention, MLP, residual block, stack.

Names of modules and parameters, the order in which parameters are registered, and the order in which random numbers
are drawn are those of OpenCLIP, so that checkpoints, optimizer states and seeds mean the same in both.

A sequence comes as a row of a batch [B, L, D], or packed behind the others [T, D] (``models/packing.py``).
What is ``read`` of a stack is computed in its last block for these tokens only: they need all keys and values, but no
other query, output projection or MLP. The result is the same.

Shapes: B rank batch, L tokens of a sequence (image or text), T tokens of all sequences of a packed row, R tokens read
(one per sequence), D width, A heads, K head dim (D = A * K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packed_attention import Packing, attend, attend_at_ends, mark_dynamic

Read = Tensor | int
"""Which token of each sequence is read: one place for all, or int64 [B] places; of a packed row int64 [R] indices."""


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in the higher precision of weights and input, and returns that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        # The statistics are fp32 with fp32 weights and bf16 activations (--precision bf16), and with an fp32 residual
        # stream and bf16 copies of weights (FSDP). A no-op when they agree.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        bias: Tensor | None = self.bias  # None with norm_kwargs bias=False
        bias = None if bias is None else bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's models were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A learned scale per channel of a residual branch. Source: arXiv 2103.17239, section 3."""

    def __init__(self, dim: int, *, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init_value * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention: one packed QKV product, then scaled_dot_product_attention.

    Causality is ``is_causal=True``, never a mask tensor: with a float mask PyTorch cannot use its flash kernels.
    """

    def __init__(self, width: int, *, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads: correct width, heads or head_width")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        # The draw order of nn.MultiheadAttention: the output projection first, then the packed input projection.
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, packing: Packing | None = None, read: Read | None = None) -> Tensor:
        """[B, L, D] or packed [T, D] -> the same; with ``read`` -> [R, D]."""
        if read is not None:
            return self._attend_from(x, packing, read)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [..., D] -> [..., 3D]
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # -> [..., 3, A, K]
        if packing is None:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # -> 3 x [B, A, L, K]
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
            attended = attended.transpose(1, 2)  # [B, A, L, K] -> [B, L, A, K]
        else:
            attended = attend(qkv, packing)  # [T, A, K]
        projected: Tensor = self.out_proj(attended.flatten(-2))  # -> [..., D]
        return projected

    def _attend_from(self, x: Tensor, packing: Packing | None, read: Read) -> Tensor:
        """Attention of the tokens read only: -> [R, D]."""
        width = x.shape[-1]
        query_weight, pair_weight = self.in_proj_weight.split([width, 2 * width])
        query_bias, pair_bias = self.in_proj_bias.split([width, 2 * width])
        query = F.linear(tokens_at(x, read), query_weight, query_bias).unflatten(-1, (self.heads, -1))  # [R, A, K]
        pairs = F.linear(x, pair_weight, pair_bias).unflatten(-1, (2, self.heads, -1))  # [..., 2, A, K]
        if packing is None:
            key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)  # 2 x [B, A, L, K]
            mask = self._visible_from(read, length=x.shape[1], device=x.device)
            attended = F.scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=mask).squeeze(2)
        else:
            attended = attend_at_ends(query, pairs, packing)
        projected: Tensor = self.out_proj(attended.flatten(-2))  # [R, A, K] -> [R, D]
        return projected

    def _visible_from(self, read: Read, *, length: int, device: torch.device) -> Tensor | None:
        """bool [R or 1, 1, 1, L]: the keys that the tokens read may see; None for all of them."""
        if not self.causal:
            return None
        last = read if isinstance(read, int) else read[:, None, None, None]
        return torch.arange(length, device=device)[None, None, None] <= last


def tokens_at(x: Tensor, read: Read) -> Tensor:
    """[B, L, D] or packed [T, D] -> [R, D]."""
    if isinstance(read, int):
        return x[:, read]
    if x.ndim == 2:
        return x.index_select(0, read)
    return x[torch.arange(len(x), device=x.device), read]


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, *, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = activation
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        projected: Tensor = self.c_proj(self.gelu(self.c_fc(x)))
        return projected


@dataclass(frozen=True)
class BlockOptions:
    """What all residual blocks of one tower have in common."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    causal: bool = False
    ls_init_value: float | None = None
    quick_gelu: bool = False
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None

    def norm(self) -> LayerNorm:
        """A new layer norm over the width."""
        return LayerNorm(self.width, **(self.norm_kwargs or {}))

    def activation(self) -> nn.Module:
        """A new activation; QuickGELU has no options."""
        return QuickGELU() if self.quick_gelu else nn.GELU(**(self.act_kwargs or {}))

    def layer_scale(self) -> nn.Module:
        """A new layer scale, or the identity."""
        if self.ls_init_value is None:
            return nn.Identity()
        return LayerScale(self.width, init_value=self.ls_init_value)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, options: BlockOptions) -> None:
        super().__init__()
        self.ln_1 = options.norm()
        self.attn = Attention(options.width, heads=options.heads, causal=options.causal)
        self.ls_1 = options.layer_scale()
        self.ln_2 = options.norm()
        hidden = int(options.width * options.mlp_ratio)
        self.mlp = Mlp(options.width, hidden=hidden, activation=options.activation())
        self.ls_2 = options.layer_scale()

    def forward(self, x: Tensor, packing: Packing | None = None, read: Read | None = None) -> Tensor:
        """[B, L, D] or packed [T, D] -> the same; with ``read`` -> [R, D]."""
        attention = self.ls_1(self.attn(self.ln_1(x), packing, read))
        attended: Tensor = (x if read is None else tokens_at(x, read)) + attention
        refined: Tensor = attended + self.ls_2(self.mlp(self.ln_2(attended)))
        return refined


class Transformer(nn.Module):
    """A stack of residual blocks under the name that checkpoints know."""

    def __init__(self, options: BlockOptions, *, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(options) for _ in range(layers))
        self.whole_last_block = False
        """Compute the last block for all tokens, whatever is read: to count, or to measure what it saves."""

    def forward(self, x: Tensor, packing: Packing | None = None, read: Read | None = None) -> Tensor:
        """[B, L, D] or packed [T, D] -> the same; with ``read`` -> [R, D]."""
        last = len(self.resblocks) - 1
        read_within = None if self.whole_last_block else read
        for index, block in enumerate(self.resblocks):
            if packing is not None and block._compiled_call_impl is not None:
                mark_dynamic(x, packing)
            x = block(x, packing, read_within if index == last else None)
        return x if read is None or read_within is not None else tokens_at(x, read)
