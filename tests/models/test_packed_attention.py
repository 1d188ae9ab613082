"""The variable-length kernels get what torch documents, and the groups compute what those kernels do."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import models.packed_attention
from models.packed_attention import attend, attend_at_ends, has_varlen_kernel
from models.packing import pack_texts
from tests.models.test_packing import captions

LENGTHS = [3, 12, 1, 7, 5, 12, 2]


def documented_varlen(*arguments: Any, **options: Any) -> Tensor:
    """torch's varlen_attn by its documentation: caption by caption, causal where the window or the switch says so."""
    given = inspect.signature(varlen_attn).bind(*arguments, **options).arguments
    query, key, value = (given[name] for name in ("query", "key", "value"))
    causal = given.get("window_size", (-1, -1)) == (-1, 0) or given.get("is_causal", False)
    assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
    pieces = []
    for queries, keys in zip(given["cu_seq_q"].unfold(0, 2, 1), given["cu_seq_k"].unfold(0, 2, 1), strict=True):
        q, k, v = query[slice(*queries)], key[slice(*keys)], value[slice(*keys)]
        assert len(q) <= given["max_q"]
        assert len(k) <= given["max_k"]
        heads_first = (part.transpose(0, 1)[None] for part in (q, k, v))
        pieces.append(F.scaled_dot_product_attention(*heads_first, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("multiple", [1, 16])
def test_both_kernels_compute_the_same_attention(monkeypatch: pytest.MonkeyPatch, multiple: int) -> None:
    packed = pack_texts(captions(LENGTHS), multiple=multiple)
    found = []
    for varlen in (False, True):
        torch.manual_seed(0)
        qkv = torch.randn(len(packed.tokens), 3, 2, 16, dtype=torch.float64, requires_grad=True)
        query = torch.randn(len(packed.packing.ends), 2, 16, dtype=torch.float64, requires_grad=True)
        monkeypatch.setattr(models.packed_attention, "has_varlen_kernel", lambda tensor, chosen=varlen: chosen)
        monkeypatch.setattr(models.packed_attention, "varlen_attn", documented_varlen)
        whole = attend(qkv, packed.packing)
        read = attend_at_ends(query, qkv[:, 1:], packed.packing)
        (whole.sin().sum() + read.cos().sum()).backward()
        found.append([whole, read, qkv.grad, query.grad])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", ["attention", "reading"])
def test_the_operators_keep_the_promises_that_compilation_rests_on(function: str) -> None:
    packing = pack_texts(captions(LENGTHS), multiple=1).packing
    qkv = torch.randn(sum(LENGTHS), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    query = torch.randn(len(LENGTHS), 2, 4, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(sum(LENGTHS), 2, 2, 4, dtype=torch.float64, requires_grad=True)
    groups = list(packing.groups)
    if function == "attention":
        torch.library.opcheck(torch.ops.clipyard.grouped_attention.default, (qkv, groups, packing.slots))
    else:
        arguments = (query, kv, groups, packing.slots, packing.order, packing.rows)
        torch.library.opcheck(torch.ops.clipyard.grouped_reading.default, arguments)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "ampere", "expected"),
    [
        ("cuda", torch.bfloat16, 64, True, True),
        ("cuda", torch.float16, 104, True, True),
        ("cuda", torch.float32, 64, True, False),
        ("cuda", torch.bfloat16, 68, True, False),
        ("cuda", torch.bfloat16, 160, True, False),
        ("cuda", torch.bfloat16, 64, False, False),
        ("cpu", torch.bfloat16, 64, True, False),
    ],
)
def test_the_kernel_is_chosen_by_device_precision_and_head_dim(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, head_dim: int, ampere: bool, expected: bool
) -> None:
    monkeypatch.setattr(models.packed_attention, "_is_ampere_or_later", lambda index: ampere)
    tensor: Any = SimpleNamespace(device=torch.device(device, 0), dtype=dtype, shape=(5, 3, 2, head_dim))
    assert has_varlen_kernel(tensor) is expected
