"""Chooses which of PyTorch's kernels computes attention (``--attention-kernel``), for all towers of a process at once.

    auto       PyTorch's own order: nothing is touched
    a name     this kernel; math, which can always, for what has one query per sequence or belongs to an evaluation
    fastest    rank 0 measures them at the image tower's shapes; the fastest comes first, the others stay behind it

It is about ``scaled_dot_product_attention``, wherever it is called: our towers, timm's, open_clip's, Hugging Face's.
Packed texts on a GPU have torch's variable-length kernel instead (``models/packed_attention.py``).

A kernel is chosen by the shapes of the model: its forward pass runs on ``meta`` and its calls are written down. Then
those shapes are tried on the device, so that a wish that cannot be fulfilled ends the run before its first step.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.clip import Clip
from models.packing import PackedTexts
from training.precision import Precision

logger = logging.getLogger(__name__)

KERNELS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""In PyTorch's own order, but for math, the last resort: it stores the attention matrix."""
_FUSED = ("flash", "efficient", "cudnn")
_TRIED_SEQUENCES = 2
"""Whether a kernel takes a shape does not depend on the number of sequences."""
_MEASURED_S = 0.2
"""For each kernel, beside its first call, which may compile it."""


class AttentionCall(NamedTuple):
    """The shapes of one call of ``scaled_dot_product_attention``."""

    tower: str
    sequences: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    mask: tuple[int, ...] | None
    causal: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        masked = ", masked" if self.mask is not None else ""
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.sequences} sequences of {self.queries} {self.tower} tokens, {self.heads} heads of {self.head_dim}"
            f"{masked}, {kind}"
        )


class Choice(NamedTuple):
    """What rank 0 found out for all."""

    order: tuple[str, ...]
    """Enabled kernels, the preferred one first; empty to leave everything to PyTorch."""
    message: str


def attention_kernel(
    wish: str,
    *,
    calls: Callable[[], Sequence[AttentionCall]],
    device: torch.device,
    on_first_rank: Callable[[Callable[[], Choice]], Choice],
) -> AbstractContextManager[object]:
    """Inside it, attention is computed as wished. Collective: all ranks, unless the wish is ``auto``.

    Args:
        calls: what the model calls, see ``attention_calls``.
        on_first_rank: calls a function on rank 0 and gives its result, or its error, to all ranks.

    Raises:
        ValueError: the kernel cannot compute the attention of this model, or not on this device.
    """
    if wish == "auto":
        return nullcontext()
    choice = on_first_rank(lambda: choose(wish, calls(), device=device))  # collective: all ranks
    logger.info("Attention: %s.", choice.message)
    return enabled(choice.order)


@contextmanager
def enabled(order: Sequence[str]) -> Iterator[None]:
    """Only these kernels, in this order of preference, in the whole process; no names change nothing."""
    if not order:
        yield
        return
    with sdpa_kernel([KERNELS[name] for name in order], set_priority=True), _programs_of(order):
        yield


@contextmanager
def _programs_of(order: Sequence[str]) -> Iterator[None]:
    """Programs compiled here are not those of other kernels, which torch's cache on disk would take for the same."""
    config: Any = torch.compiler.config
    if not hasattr(config, "cache_key_tag"):
        yield
        return
    before = config.cache_key_tag
    config.cache_key_tag = f"{before} attention={','.join(order)}".strip()
    try:
        yield
    finally:
        config.cache_key_tag = before


def choose(wish: str, calls: Sequence[AttentionCall], *, device: torch.device) -> Choice:
    """The kernels to enable for a wish other than ``auto``.

    Raises:
        ValueError: a call of the model that the kernel cannot compute.
    """
    # One query per sequence is a hundredth of the work, and has a mask where captions are padded.
    calls = [call for call in calls if call.queries > 1]
    if not calls:
        return Choice((), f"--attention-kernel {wish} has no effect: no tower calls PyTorch's attention")
    if wish == "fastest":
        return _fastest(calls[0], device=device)
    for call in calls:
        if reason := why_not(wish, call, device=device):
            raise ValueError(
                f"--attention-kernel {wish} cannot compute {call}, on {device.type}: {reason}. Give another kernel, or "
                "auto: PyTorch then takes for each shape what can"
            )
    return Choice(tuple(dict.fromkeys((wish, "math"))), f"{wish} for {'; '.join(map(str, calls))}")


def why_not(kernel: str, call: AttentionCall, *, device: torch.device) -> str:
    """Why a kernel cannot compute a call, forward and backward; empty if it can."""
    call = call._replace(
        sequences=_TRIED_SEQUENCES, mask=call.mask and (min(call.mask[0], _TRIED_SEQUENCES), *call.mask[1:])
    )
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")  # PyTorch warns with the reason and raises without
        try:
            _run(kernel, call, device)()
        except RuntimeError as error:
            found = [str(reason.message).partition(" (Triggered")[0].strip() for reason in reasons]
            return " ".join(dict.fromkeys(found)) or str(error).partition("\n")[0]
    return ""


def measure(kernel: str, call: AttentionCall, *, device: torch.device) -> float:
    """Seconds of one forward and backward pass: the median of as many as a fifth of a second allows, three at least."""
    run = _run(kernel, call, device)
    run()
    times: list[float] = []
    end = time.perf_counter() + _MEASURED_S
    while len(times) < 3 or time.perf_counter() < end:
        times.append(_seconds(run, device))
    return sorted(times)[len(times) // 2]


def attention_calls(
    model: Clip, images: Tensor, texts: Tensor | PackedTexts, *, precision: Precision
) -> list[AttentionCall]:
    """The different calls of a training step, the image tower's first. Everything lies on ``meta``: no memory, no time.

    A Hugging Face tower looks at the values of its masks, so it cannot run there; its configuration says as much.
    """
    found: dict[AttentionCall, None] = {}

    def note(tower: str, *arguments: Any, **options: Any) -> Tensor:
        call = _as_call(tower, *arguments, **options)
        found[call._replace(dtype=precision.autocast_dtype or call.dtype)] = None
        return real(*arguments, **options)

    real = F.scaled_dot_product_attention
    with torch.no_grad():
        with _replaced(partial(note, "image")):
            model.encode_image(images)
        if model.config.text_cfg.hf_model_name is None:
            with _replaced(partial(note, "text")):
                model.encode_text(texts)
        else:
            found[_call_of_hugging_face(model, images, precision)] = None
    return list(found)


def _fastest(call: AttentionCall, *, device: torch.device) -> Choice:
    if device.type == "cpu" or call.dtype == torch.float32:
        place = "on the CPU" if device.type == "cpu" else "in fp32"
        return Choice((), f"--attention-kernel fastest has nothing to choose from {place}")
    times = {name: measure(name, call, device=device) for name in _FUSED if not why_not(name, call, device=device)}
    return rank_by_time(times, call)


def rank_by_time(times: Mapping[str, float], call: AttentionCall) -> Choice:
    """The fastest first, then all others in PyTorch's order: they compute what the fastest cannot."""
    if not times:
        return Choice((), f"--attention-kernel fastest: only math can compute {call}")
    fastest = min(times, key=lambda name: times[name])
    listed = ", ".join(f"{name} {1000 * times[name]:.2f} ms" if name in times else f"{name} cannot" for name in _FUSED)
    return Choice((fastest, *(name for name in KERNELS if name != fastest)), f"{fastest} first, for {call}: {listed}")


def _run(kernel: str, call: AttentionCall, device: torch.device) -> Callable[[], None]:
    """Forward and backward of one call, with inputs of the layout that one QKV product gives."""
    shape = (call.sequences, call.queries, call.heads, call.head_dim)
    query = torch.randn(shape, device=device, dtype=call.dtype).transpose(1, 2).requires_grad_()
    key, value = (
        torch.randn(call.sequences, call.keys, call.heads, call.head_dim, device=device, dtype=call.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(2)
    )
    mask = None if call.mask is None else torch.ones(call.mask, dtype=torch.bool, device=device)
    gradient = torch.randn(shape, device=device, dtype=call.dtype).transpose(1, 2)

    def run() -> None:
        with enabled([kernel]):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=call.causal)
        torch.autograd.grad(attended, (query, key, value), gradient)

    return run


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def _as_call(
    tower: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> AttentionCall:
    *rows, queries, head_dim = query.shape
    heads = rows.pop() if rows else 1
    mask = None if attn_mask is None else tuple(attn_mask.shape)
    sequences = torch.Size(rows).numel()
    return AttentionCall(tower, sequences, heads, queries, key.shape[-2], head_dim, mask, is_causal, query.dtype)


def _call_of_hugging_face(model: Clip, images: Tensor, precision: Precision) -> AttentionCall:
    tower: Any = model.text
    settings = tower.transformer.config
    heads, tokens = settings.num_attention_heads, model.context_length
    head_dim = settings.hidden_size // heads
    mask = (len(images), 1, tokens, tokens)
    dtype = precision.autocast_dtype or precision.weight_dtype
    return AttentionCall("text", len(images), heads, tokens, tokens, head_dim, mask, False, dtype)


@contextmanager
def _replaced(attention: Callable[..., Tensor]) -> Iterator[None]:
    """Everybody looks the function up where it is called, torch's own modules too."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real
