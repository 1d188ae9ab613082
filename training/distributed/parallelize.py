"""Turns a single-device model into the one that trains: the only place where it is wrapped, and in which order.

    memory format -> SyncBatchNorm -> activation checkpointing -> torch.compile -> DistributedDataParallel, or FSDP2

Each acts from outside on the model's towers or their blocks; parameter names stay those of the plain one.

With FSDP every block is a group of its own, gathered when it computes, and what is left of the model is another. The
rules of precision are those of DDP, in which autocast decides operation by operation:

    blocks             gathered in the type of --precision, if all they do allows it: half of the bytes to send
    all the rest       gathered in fp32: embeddings begin the residual stream, and with it the sums of all blocks
    logit_scale        whole on every rank, in fp32, as all single numbers, and vectors such as layer scale
    gradients          summed over ranks in the type of --grad-reduce-dtype
    inputs of blocks   as they are: FSDP would round a residual stream that autocast keeps in fp32
"""

from __future__ import annotations

import inspect
import logging
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.transformer import Attention, LayerNorm
from training.config import EngineConfig
from training.distributed.activation_checkpointing import checkpoint_blocks
from training.distributed.compilation import compile_towers
from training.distributed.gradient_exchange import REDUCE_DTYPES, bucket_cap_mib, log_reduce_dtype, send_in_bf16
from training.distributed.initial_weights import check_no_meta_tensors, send_weights
from training.distributed.memory_format import apply_channels_last, wants_channels_last
from training.distributed.mesh import build_mesh, is_sharded
from training.distributed.runtime import COLLECTIVE_TIMEOUT, Runtime
from training.distributed.sharding import register_sharding
from training.validation import check_reduce_dtype

logger = logging.getLogger(__name__)

_CAST_BY_AUTOCAST = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, Attention),
    *(nn.LayerNorm, nn.GroupNorm, _BatchNorm),
)
"""Modules whose vectors go through operations for which autocast chooses the precision."""
_FORWARD_METHODS = ("encode_image", "encode_text")
"""What evaluation calls instead of ``forward``."""


def parallelize(
    model: nn.Module,
    *,
    config: EngineConfig,
    runtime: Runtime,
    param_dtype: torch.dtype | None = None,
    source: nn.Module | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> nn.Module:
    """The model as it trains; ``unwrap`` gives back the plain one. All ranks must call it, with equal weights.

    Args:
        model: on its device; with --fsdp it may be on ``meta`` on all ranks.
        param_dtype: what autocast computes in; the type in which FSDP gathers blocks.
        source: for a model on ``meta``: on rank 0 the same model with its weights, on the CPU.
        timeout: of the collectives of FSDP's groups.

    Raises:
        ValueError: --use-bn-sync or --fsdp-offload-cpu on processes without a GPU; --fsdp-shard-ranks that do not
            divide the ranks; --grad-reduce-dtype bf16 on too many ranks.
    """
    check_reduce_dtype(config, world_size=runtime.world_size)
    shares = is_sharded(config, world_size=runtime.world_size)
    if wants_channels_last(model, config.channels_last, device_type=runtime.device.type):
        apply_channels_last(model, is_sharded=shares)
        logger.info("image tower: NHWC memory%s", " for images; for weights FSDP knows NCHW only" if shares else "")
    elif config.channels_last == "on":
        logger.info("--channels-last on has no effect: the image tower has no convolution but that of its patches.")
    if config.use_bn_sync and runtime.world_size > 1:
        model = _synchronize_batch_norm(model, runtime)
    if config.grad_checkpointing:
        _checkpoint(model, policy=config.grad_checkpointing_policy)
    if config.torchcompile:
        compile_towers(model, config, device=runtime.device, world_size=runtime.world_size)
    log_reduce_dtype(model, config.grad_reduce_dtype, world_size=runtime.world_size, is_sharded=shares)
    if shares:
        return _shard(model, config, runtime=runtime, param_dtype=param_dtype, source=source, timeout=timeout)
    if runtime.world_size > 1:
        return _replicate(model, config, runtime=runtime)
    if config.fsdp:
        logger.info("--fsdp has no effect: a single process holds the whole model.")
    return model


def _replicate(model: nn.Module, config: EngineConfig, *, runtime: Runtime) -> DistributedDataParallel:
    replicated = DistributedDataParallel(
        model,
        device_ids=[runtime.device.index] if runtime.device.type == "cuda" else None,
        static_graph=config.ddp_static_graph,
        # Gradients live in the communication buckets: 4 bytes per parameter and one copy less.
        gradient_as_bucket_view=True,
        find_unused_parameters=False,
        bucket_cap_mb=bucket_cap_mib(model),
        # Rank 0's running statistics for everybody, once per step. Other buffers are constants.
        **_sync_buffers(any(_has_own_statistics(module) for module in model.modules())),
    )
    if config.grad_reduce_dtype == "bf16":
        send_in_bf16(replicated)
    return replicated


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside, with its own parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def tower_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the image tower, then of the text tower (which computes first), each as they follow."""
    return [block for name in ("image_blocks", "text_blocks") for block in getattr(model, name, ())]


def _shard(
    model: nn.Module,
    config: EngineConfig,
    *,
    runtime: Runtime,
    param_dtype: torch.dtype | None,
    source: nn.Module | None,
    timeout: timedelta,
) -> nn.Module:
    if config.fsdp_offload_cpu and runtime.device.type == "cpu":
        raise ValueError("--fsdp-offload-cpu with --device cpu: the shards are in host memory already; leave it out")
    mesh = build_mesh(config.fsdp_shard_ranks, runtime=runtime, timeout=timeout)
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    fully_shard_blocks(model, config, mesh=mesh, param_dtype=param_dtype)
    if is_meta:
        _allocate(model, device=runtime.device, offload=config.fsdp_offload_cpu)
    register_sharding(model)
    if is_meta:
        send_weights(model, source, device=runtime.device)
    if mesh.ndim == 1:
        logger.info("FSDP: %d ranks share one copy of the model.", mesh.size())
    else:
        logger.info("HSDP: %d copies of the model, each shared by %d ranks.", mesh.size(0), mesh.size(1))
    return model


def fully_shard_blocks(
    model: nn.Module, config: EngineConfig, *, mesh: DeviceMesh, param_dtype: torch.dtype | None
) -> None:
    """Applies FSDP2 in place; ``register_sharding`` is left to do."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": _whole_parameters(model),
    }
    if config.fsdp_offload_cpu:
        options["offload_policy"] = CPUOffloadPolicy()
    blocks = tower_blocks(model)
    if not blocks:
        logger.warning("--fsdp gathers all weights at once: no tower of this model is made of repeated blocks")
    for block in blocks:
        lower = param_dtype if _may_be_lowered(block, device_type=mesh.device_type) else None
        policy = _policy(lower, config)
        fully_shard(block, mp_policy=policy, reshard_after_forward=not config.fsdp_no_reshard_after_forward, **options)
    # What is outside of blocks is needed at the start of both towers and at their ends: gathered once.
    fully_shard(model, mp_policy=_policy(None, config), reshard_after_forward=False, **options)
    for method in _FORWARD_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def _whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Single numbers, and vectors that a block multiplies with by itself, such as layer scale.

    Autocast casts what goes into products and convolutions. A vector beside them stays fp32 and raises the residual
    stream to fp32; gathered in lower precision it would lower it.
    """
    whole = {parameter for parameter in model.parameters() if parameter.numel() == 1}
    for block in tower_blocks(model):
        for module in block.modules():
            if not isinstance(module, _CAST_BY_AUTOCAST):
                whole |= {parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 1}
    return whole


def _policy(param_dtype: torch.dtype | None, config: EngineConfig) -> MixedPrecisionPolicy:
    reduce_dtype = REDUCE_DTYPES[config.grad_reduce_dtype]
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


def _may_be_lowered(block: nn.Module, *, device_type: str) -> bool:
    """Whether every operation of a block takes weights in lower precision; under autocast most of them cast anyway."""
    for module in block.modules():
        if hasattr(module, "running_mean"):
            return False  # batch_norm wants weights in the type of its statistics
        if device_type == "cpu" and isinstance(module, nn.LayerNorm) and not isinstance(module, LayerNorm):
            return False  # autocast raises the weights of layer_norm on GPUs only
    return True


def _allocate(model: nn.Module, *, device: torch.device, offload: bool) -> None:
    """Memory for what this rank holds, with any values."""
    model.to_empty(device="cpu" if offload else device)
    if offload:
        # Only what FSDP moves to the device by itself may stay in host memory.
        for module in model.modules():
            for value in [*module._parameters.values(), *module._buffers.values()]:
                if value is not None and not isinstance(value, DTensor):
                    value.data = value.data.to(device)
    check_no_meta_tensors(model)


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


def _checkpoint(model: nn.Module, *, policy: str) -> None:
    blocks = tower_blocks(model)
    if not blocks:
        logger.warning("--grad-checkpointing has no effect: no tower of this model is made of repeated blocks")
        return
    checkpoint_blocks(blocks, policy=policy)
    logger.info("activation checkpointing: %d blocks, %s", len(blocks), policy)
