"""Turns a single-device model into the one that trains: the only place where it is wrapped, and in which order.

    SyncBatchNorm -> activation checkpointing of blocks -> torch.compile of blocks -> DistributedDataParallel

Each acts from outside on the model's ``image_blocks`` and ``text_blocks``; parameter names stay those of the plain one.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from training.config import EngineConfig
from training.distributed.runtime import Runtime

logger = logging.getLogger(__name__)


def parallelize(model: nn.Module, *, config: EngineConfig, runtime: Runtime) -> nn.Module:
    """The model as it trains; ``unwrap`` gives back the plain one. All ranks must call it, with equal weights.

    Raises:
        ValueError: --use-bn-sync on processes without a GPU.
    """
    if config.use_bn_sync and runtime.world_size > 1:
        model = _synchronize_batch_norm(model, runtime)
    if config.grad_checkpointing:
        _checkpoint_blocks(model)
    if config.torchcompile:
        _compile_blocks(model, backend=config.torchcompile_backend, mode=config.torchcompile_mode)
    if runtime.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
        static_graph=config.ddp_static_graph,
        # Gradients live in the communication buckets: 4 bytes per parameter and one copy less.
        gradient_as_bucket_view=True,
        find_unused_parameters=False,
        # Rank 0's running statistics for everybody, once per step. Other buffers are constants.
        **_sync_buffers(any(_has_own_statistics(module) for module in model.modules())),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside, with its own parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def tower_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of both towers: image tower first, each in the order of its forward pass."""
    return [block for name in ("image_blocks", "text_blocks") for block in getattr(model, name, ())]


def _synchronize_batch_norm(model: nn.Module, runtime: Runtime) -> nn.Module:
    if runtime.device.type == "cpu":
        raise ValueError("--use-bn-sync with several CPU processes: SyncBatchNorm needs GPUs; leave the flag out")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def _sync_buffers(wanted: bool) -> dict[str, Any]:
    """DDP's argument was renamed in torch 2.15, and the old name warns there."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": wanted}


def _has_own_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, nn.SyncBatchNorm)


def _checkpoint_blocks(model: nn.Module) -> None:
    """Keeps only each block's input for the backward pass and computes the rest again: about a third more time."""
    blocks = _require_blocks(model, "--grad-checkpointing")
    for block in blocks:
        # An attribute on the instance hides the method of the class: no wrapper module, so no new names. Dropout draws
        # the same masks again, because the random state is kept with the input.
        plain = block.forward
        block.forward = functools.partial(_checkpointed, plain)
    logger.info("activation checkpointing: %d blocks", len(blocks))


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compile_blocks(model: nn.Module, *, backend: str | None, mode: str | None) -> None:
    """Block by block: all blocks of a tower share one compiled graph, and nothing breaks at the edges of DDP."""
    blocks = _require_blocks(model, "--torchcompile")
    # All blocks share one cache: two towers, the last block of each, with gradient and without, other batch sizes in an
    # evaluation. Beyond the limit torch runs them uncompiled.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(backend=backend or "inductor", mode=mode)
    logger.info("torch.compile: %d blocks, backend %s, mode %s", len(blocks), backend or "inductor", mode or "default")


def _require_blocks(model: nn.Module, flag: str) -> list[nn.Module]:
    blocks = tower_blocks(model)
    if not blocks:
        logger.warning("%s has no effect: no tower of this model is made of repeated blocks", flag)
    return blocks
