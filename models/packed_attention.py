"""Attention inside each caption of a packed row: every token sees its own caption up to itself, and nothing else.

    on CUDA in half precision   torch's variable-length flash kernels: captions lie one after another, no copies
    everywhere else             captions sorted by length, in a few groups of about one length, each cut to its longest

Both are exact. In a group a short caption is followed by copies of its last token: causality hides them from its own
tokens, and what they compute is not read back.

Shapes: C captions, T tokens of all captions, A heads, K head dim, D width (D = A * K), G groups, n captions of a
group, W length of the longest of them, S slots of all groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import register_flop_formula


class Packing(NamedTuple):
    """Where the captions of a packed row lie. Made on the host (``models/packing.py``), then moved to the device."""

    offsets: Tensor
    """int32 [C+1]: caption c is tokens ``offsets[c]`` to ``offsets[c + 1]``."""
    ends: Tensor
    """int64 [C]: index of each caption's last token."""
    places: Tensor
    """int32 [C+1]: 0, 1, ... C, the ``offsets`` of rows that hold one token per caption."""
    longest: int
    """Upper bound of the lengths, the same for many batches: it chooses kernels, not results."""
    groups: tuple[Tensor, ...]
    """G x int64 [n, W]: index of the token in each slot of a group; behind a caption's end its last token again."""
    slots: Tensor
    """int64 [T]: the slot, counted through all groups, that holds each token."""
    order: Tensor
    """int64 [C]: the caption in each row of the groups, row after row: sorted by length."""
    rows: Tensor
    """int64 [C]: the row of each caption."""


def attend(qkv: Tensor, packing: Packing) -> Tensor:
    """Causal attention within captions: [T, 3, A, K] -> [T, A, K]."""
    if not has_varlen_kernel(qkv):
        grouped: Tensor = _grouped_attention(qkv, packing.groups, packing.slots)
        return grouped
    query, key, value = qkv.unbind(1)  # 3 x [T, A, K]
    return _varlen(query, key, value, packing.offsets, packing.offsets, packing.longest, packing.longest, **_CAUSAL)


def attend_at_ends(query: Tensor, kv: Tensor, packing: Packing) -> Tensor:
    """Attention of each caption's last token to its whole caption: [C, A, K], [T, 2, A, K] -> [C, A, K]."""
    if not has_varlen_kernel(query):
        grouped: Tensor = _grouped_reading(query, kv, packing.groups, packing.slots, packing.order, packing.rows)
        return grouped
    key, value = kv.unbind(1)  # 2 x [T, A, K]
    return _varlen(query, key, value, packing.places, packing.offsets, 1, packing.longest)


def has_varlen_kernel(tensor: Tensor) -> bool:
    """Whether torch's variable-length kernels take a tensor [..., K]: flash attention on an Ampere GPU or later."""
    if tensor.device.type != "cuda" or tensor.dtype not in (torch.float16, torch.bfloat16):
        return False
    head_dim = tensor.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 128 and _is_ampere_or_later(tensor.device.index)


def mark_dynamic(tokens: Tensor, packing: Packing) -> None:
    """Tells torch.compile what differs from batch to batch, so that one program serves all of them."""
    torch._dynamo.maybe_mark_dynamic(tokens, 0)
    torch._dynamo.maybe_mark_dynamic(packing.slots, 0)
    for group in packing.groups:
        torch._dynamo.maybe_mark_dynamic(group, 1)


# Older releases of torch have a switch where newer ones have a window.
_HAS_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if _HAS_WINDOW else {"is_causal": True}


def _varlen(*arguments: Any, **options: Any) -> Tensor:
    # Not cuDNN's kernel, which newer releases prefer: it is planned anew for every T.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return varlen_attn(*arguments, **options)  # type: ignore[return-value]  # a pair only where asked for


@lru_cache(maxsize=8)
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_ampere_or_later(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


# Custom operators: torch.compile need not look inside, where shapes differ from batch to batch. Their backward passes
# are written out, because autograd does not record what runs inside of an operator.


@torch.library.custom_op(
    "clipyard::grouped_attention", mutates_args=(), schema="(Tensor qkv, Tensor[] groups, Tensor slots) -> Tensor"
)
def _grouped_attention(qkv: Tensor, groups: Sequence[Tensor], slots: Tensor) -> Tensor:
    attended = []
    with torch.autocast(qkv.device.type, enabled=False):
        for group in groups:
            query, key, value = _heads(_gather(qkv, group)).unbind(0)  # 3 x [n, A, W, K]
            found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            attended.append(found.transpose(1, 2).flatten(0, 1))  # [n, A, W, K] -> [n * W, A, K]
    return torch.cat(attended).index_select(0, slots)  # [S, A, K] -> [T, A, K]


@torch.library.custom_op(
    "clipyard::grouped_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor qkv, Tensor[] groups, Tensor slots) -> Tensor",
)
def _grouped_attention_backward(gradient: Tensor, qkv: Tensor, groups: Sequence[Tensor], slots: Tensor) -> Tensor:
    spread = _spread(gradient, groups, slots)
    gradients = []
    with torch.autocast(qkv.device.type, enabled=False):
        for group, of_group in zip(groups, spread, strict=True):
            query, key, value = _heads(_gather(qkv, group)).unbind(0)  # 3 x [n, A, W, K]
            future = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool, device=group.device).triu(1)
            parts = torch.stack(
                _attention_gradients(query, key, value, of_group.transpose(1, 2), hidden=future)
            )  # [3, n, A, W, K]
            gradients.append(parts.permute(1, 3, 0, 2, 4).flatten(0, 1))  # -> [n * W, 3, A, K]
    return torch.cat(gradients).index_select(0, slots)  # [S, 3, A, K] -> [T, 3, A, K]


@torch.library.custom_op(
    "clipyard::grouped_reading",
    mutates_args=(),
    schema="(Tensor query, Tensor kv, Tensor[] groups, Tensor slots, Tensor order, Tensor rows) -> Tensor",
)
def _grouped_reading(
    query: Tensor, kv: Tensor, groups: Sequence[Tensor], slots: Tensor, order: Tensor, rows: Tensor
) -> Tensor:
    attended = []
    with torch.autocast(query.device.type, enabled=False):
        for group, of_group in zip(groups, _split_rows(query, groups, order), strict=True):
            key, value = _heads(_gather(kv, group)).unbind(0)  # 2 x [n, A, W, K]
            visible = ~_is_repeated(group)[:, None, None]  # [n, 1, 1, W]
            found = F.scaled_dot_product_attention(of_group[:, :, None], key, value, attn_mask=visible)
            attended.append(found.squeeze(2))  # [n, A, 1, K] -> [n, A, K]
    return torch.cat(attended).index_select(0, rows)  # [C, A, K], in the order of captions


@torch.library.custom_op(
    "clipyard::grouped_reading_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor kv, Tensor[] groups, Tensor slots, Tensor order, Tensor rows)"
    " -> (Tensor, Tensor)",
)
def _grouped_reading_backward(
    gradient: Tensor,
    query: Tensor,
    kv: Tensor,
    groups: Sequence[Tensor],
    slots: Tensor,
    order: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    of_queries, of_pairs = [], []
    with torch.autocast(query.device.type, enabled=False):
        pieces = (_split_rows(tensor, groups, order) for tensor in (query, gradient))
        for group, of_group, piece in zip(groups, *pieces, strict=True):
            key, value = _heads(_gather(kv, group)).unbind(0)  # 2 x [n, A, W, K]
            hidden = _is_repeated(group)[:, None, None]  # [n, 1, 1, W]
            of_query, *pair = _attention_gradients(
                of_group[:, :, None], key, value, piece[:, :, None], hidden=hidden
            )
            of_queries.append(of_query.squeeze(2))  # [n, A, 1, K] -> [n, A, K]
            of_pairs.append(torch.stack(pair).permute(1, 3, 0, 2, 4).flatten(0, 1))  # -> [n * W, 2, A, K]
    return torch.cat(of_queries).index_select(0, rows), torch.cat(of_pairs).index_select(0, slots)


def _gather(packed: Tensor, group: Tensor) -> Tensor:
    """[T, parts, A, K] -> [n, W, parts, A, K]."""
    gathered: Tensor = packed.index_select(0, group.flatten()).unflatten(0, group.shape)
    return gathered


def _heads(part: Tensor) -> Tensor:
    """[n, W, parts, A, K] -> [parts, n, A, W, K]."""
    return part.permute(2, 0, 3, 1, 4)


def _spread(packed: Tensor, groups: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
    """[T, A, K] -> G x [n, W, A, K], zero in the slots that repeat a token."""
    sizes = [group.numel() for group in groups]
    spread = packed.new_zeros(sum(sizes), *packed.shape[1:]).index_copy_(0, slots, packed)
    return [piece.unflatten(0, group.shape) for piece, group in zip(spread.split(sizes), groups, strict=True)]


def _split_rows(query: Tensor, groups: Sequence[Tensor], order: Tensor) -> tuple[Tensor, ...]:
    """[C, A, K] -> G x [n, A, K]."""
    pieces: tuple[Tensor, ...] = query.index_select(0, order).split([len(group) for group in groups])
    return pieces


def _is_repeated(group: Tensor) -> Tensor:
    """bool [n, W]: whether a slot holds a caption's last token once more. The tokens of a caption are consecutive."""
    return group != group[:, :1] + torch.arange(group.shape[1], device=group.device)


def _attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, *, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(QK' / sqrt(K)) V, computed in at least fp32: [n, A, Q, K] and 2 x [n, A, W, K].

    Args:
        hidden: bool, broadcast to [n, A, Q, W]: the keys that a query may not see.
    """
    given, accurate = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value, gradient = (tensor.to(accurate) for tensor in (query, key, value, gradient))
    scale = query.shape[-1] ** -0.5
    weights = (query * scale @ key.mT).masked_fill_(hidden, -torch.inf).softmax(-1)  # [n, A, Q, W]
    of_weights = gradient @ value.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    of_query, of_key, of_value = of_scores @ key * scale, of_scores.mT @ query * scale, weights.mT @ gradient
    return of_query.to(given), of_key.to(given), of_value.to(given)


@_grouped_attention.register_fake
def _(qkv: Tensor, groups: Sequence[Tensor], slots: Tensor) -> Tensor:
    return torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)


@_grouped_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, groups: Sequence[Tensor], slots: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


@_grouped_reading.register_fake
def _(
    query: Tensor, kv: Tensor, groups: Sequence[Tensor], slots: Tensor, order: Tensor, rows: Tensor
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@_grouped_reading_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    kv: Tensor,
    groups: Sequence[Tensor],
    slots: Tensor,
    order: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    form = torch.contiguous_format
    return torch.empty_like(query, memory_format=form), torch.empty_like(kv, memory_format=form)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, groups, slots = inputs
    ctx.save_for_backward(qkv, slots, *groups)


def _attention_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    qkv, slots, *groups = ctx.saved_tensors
    of_qkv = _grouped_attention_backward(gradient, qkv, groups, slots)
    return of_qkv, [None] * len(groups), None


def _keep_reading(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, kv, groups, slots, order, rows = inputs
    ctx.save_for_backward(query, kv, slots, order, rows, *groups)


def _reading_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, kv, slots, order, rows, *groups = ctx.saved_tensors
    of_query, of_kv = _grouped_reading_backward(gradient, query, kv, groups, slots, order, rows)
    return of_query, of_kv, [None] * len(groups), None, None, None


_grouped_attention.register_autograd(_attention_backward, setup_context=_keep_attention)
_grouped_reading.register_autograd(_reading_backward, setup_context=_keep_reading)


# FLOPs as FlopCounterMode counts them for torch's own attention: two products forward, five backward (the weights are
# computed again), masked halves in full.


@register_flop_formula(torch.ops.clipyard.grouped_attention)
def _attention_flops(qkv: Sequence[int], groups: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return sum(2 * 2 * rows * longest * longest for rows, longest in groups) * qkv[-2] * qkv[-1]


@register_flop_formula(torch.ops.clipyard.grouped_attention_backward)
def _attention_backward_flops(
    gradient: Sequence[int], qkv: Sequence[int], groups: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    return _attention_flops(qkv, groups) * 5 // 2


@register_flop_formula(torch.ops.clipyard.grouped_reading)
def _reading_flops(
    query: Sequence[int], kv: Sequence[int], groups: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    return sum(2 * 2 * rows * longest for rows, longest in groups) * query[-2] * query[-1]


@register_flop_formula(torch.ops.clipyard.grouped_reading_backward)
def _reading_backward_flops(
    gradient: Sequence[int],
    query: Sequence[int],
    kv: Sequence[int],
    groups: Sequence[Sequence[int]],
    *_: Any,
    **__: Any,
) -> int:
    return _reading_flops(query, kv, groups) * 5 // 2
