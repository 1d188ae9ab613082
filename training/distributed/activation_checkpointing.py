"""Trades time for memory: what a block computes in the forward pass is kept, or computed again in the backward pass.

    none         everything that the backward pass reads is kept
    selective    kept: the block's input, and results of matrix products, convolutions and attention;
                 computed again: norms, activations, scales, sums, casts, depthwise convolutions
    full         kept: the block's input; computed again: the whole block, about a third of a step

Both give the gradients of ``none`` bit for bit: the same operations run on the same numbers, and random ones draw the
same numbers again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Forward = Callable[..., Any]

DEAR_TO_COMPUTE = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"),
        *("aten::convolution", "aten::_convolution", "aten::cudnn_convolution"),
        *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
        *("aten::_scaled_dot_product_fused_attention_overrideable", "torch_attn::_varlen_attn"),
        *("clipyard::grouped_attention", "clipyard::grouped_reading"),
    }
)
"""Operations whose time grows with the width of what they read, not with its size alone. The rest of a block reads and
writes memory once per element, which a GPU does many times faster than these."""


def checkpoint_blocks(blocks: Iterable[nn.Module], *, policy: str) -> None:
    """Changes the blocks in place.

    Args:
        policy: ``full`` or ``selective``.
    """
    for block in blocks:
        # An attribute on the instance hides the method of the class: no wrapper module, so no new names.
        block.forward = functools.partial(_checkpointed, block.forward, block, policy)


def _checkpointed(forward: Forward, block: nn.Module, policy: str, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Dropout draws the same masks again, because the random state is kept with the input.
    return checkpoint(forward, *args, use_reentrant=False, **_options(block, policy), **kwargs)


def _options(block: nn.Module, policy: str) -> dict[str, Any]:
    is_selective = policy == "selective"
    # A compiled block updates its statistics once in any case, and takes no other contexts than torch's.
    if torch.compiler.is_compiling() or not any(isinstance(module, _BatchNorm) for module in block.modules()):
        return {"context_fn": _selective_contexts} if is_selective else {}
    return {"context_fn": functools.partial(_contexts_with_statistics, block, is_selective)}


def _is_kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_dear = operation._schema.name in DEAR_TO_COMPUTE and not _is_depthwise(operation, args)
    return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE


def _is_depthwise(operation: Any, args: tuple[Any, ...]) -> bool:
    """A convolution of each channel by itself: a hundredth of ConvNeXt's FLOPs, an eighth of its memory."""
    return operation._schema.name == "aten::convolution" and bool(args[8] == len(args[1]) > 1)  # groups, filters


_selective_contexts = functools.partial(create_selective_checkpoint_contexts, _is_kept)


def _contexts_with_statistics(block: nn.Module, is_selective: bool) -> tuple[Any, Any]:
    """The contexts of the first computation and of the second, which BatchNorm must not count."""
    first, second = _selective_contexts() if is_selective else (nullcontext(), nullcontext())
    return first, _without_counting(block, second)


@contextmanager
def _without_counting(block: nn.Module, context: AbstractContextManager[Any]) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        with context:
            yield
    finally:
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.data.copy_(before)  # autograd has noted the buffer, and does not read its values
