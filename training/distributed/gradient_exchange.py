"""How DDP brings gradients together: in buckets of what size, and in what type.

DDP sends a bucket as soon as all its gradients are there. Small ones start early and hide behind more of the backward
pass; each of them waits for all ranks once, and on many nodes that costs more than its bytes.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of --grad-reduce-dtype."""

_HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

_DEFAULT_MIB = 25
_LARGEST_MIB = 200
_BUCKETS = 16


def bucket_cap_mib(model: nn.Module) -> int | None:
    """Size of a bucket; None for torch's own (25 MiB, the first one 1 MiB).

    A sixteenth of all, so that most of them start early. From 200 MiB on a bucket is sent at the network's full rate,
    and larger ones would only start later. The last one, which nothing hides, is no smaller than the token embedding,
    whose gradient comes last in one piece. The choice depends on the model alone: a resumed run adds up in the same
    order.
    """
    nbytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    size = min(_LARGEST_MIB, nbytes // _BUCKETS // 2**20)
    return size if size > _DEFAULT_MIB else None


def send_in_bf16(model: DistributedDataParallel) -> None:
    """Gradients are rounded to bf16, divided by the ranks, added up in bf16, and are fp32 again on every rank.

    Half of the bytes; ranks still get equal gradients. A ring adds one rank after the other, so a term of W is lost
    where the sum has grown to W / 2^8 of them: not for many ranks, which ``check_reduce_dtype`` refuses.
    """
    model.register_comm_hook(None, bf16_compress_hook)  # None: the group of all ranks


def log_reduce_dtype(model: nn.Module, name: str, *, world_size: int, is_sharded: bool) -> None:
    """One line where sums are not in fp32, or where the flag does nothing."""
    if world_size == 1:
        if name == "bf16":
            logger.info("--grad-reduce-dtype bf16 has no effect: a single process has no gradients to exchange.")
        return
    if name == "bf16":
        logger.info("Gradients are summed over ranks in bf16: half of the bytes, 8 significant bits.")
        return
    halves = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} & _HALVES.keys()
    if not is_sharded and halves:
        logger.warning(
            "Gradients of weights in %s are summed over %d ranks in that type: only --fsdp sums them in fp32. In bf16 "
            "a sum over hundreds of ranks loses much of what is added.",
            " and ".join(sorted(_HALVES[dtype] for dtype in halves)),
            world_size,
        )
