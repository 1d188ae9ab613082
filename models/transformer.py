"""The transformer shared by both towers: attention, MLP, residual block, stack.

Names of modules and parameters, the order in which parameters are registered, and the order in which random numbers
are drawn are those of OpenCLIP, so that checkpoints, optimizer states and seeds mean the same in both.

Shapes: B rank batch, L tokens of a sequence (image or text), D width, A heads, K head dim (D = A * K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, L, D] -> [B, L, 3D]
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads)  # -> [B, L, 3, A, K]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # -> 3 x [B, A, L, K]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)  # [B, A, L, K]
        merged = attended.transpose(1, 2).reshape(batch, length, width)  # -> [B, L, D]
        projected: Tensor = self.out_proj(merged)
        return projected


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        attended: Tensor = x + self.ls_1(self.attn(self.ln_1(x)))
        refined: Tensor = attended + self.ls_2(self.mlp(self.ln_2(attended)))
        return refined


class Transformer(nn.Module):
    """A stack of residual blocks under the name that checkpoints know."""

    def __init__(self, options: BlockOptions, *, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(options) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        for block in self.resblocks:
            x = block(x)
        return x
