"""Which ranks share one copy of the model (FSDP), and which hold the same rows of different copies (HSDP).

    8 ranks, --fsdp-shard-ranks 4           shard axis ->
                             copy 0         0 1 2 3
                             copy 1         4 5 6 7         replicate axis: 0 and 4, 1 and 5, ...

Weights and gradients travel along the shard axis several times in a step, along the other one once, and only a shard of
them. So neighbours share a copy: launchers number the ranks node by node, and within a node the network is fastest.
"""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from training.config import EngineConfig
from training.distributed.runtime import COLLECTIVE_TIMEOUT, Runtime

_MESHES: dict[tuple[object, int, timedelta, str], DeviceMesh] = {}
"""Groups hold memory of the device until the process ends, so every phase of a run takes the same ones."""


def is_sharded(config: EngineConfig, *, world_size: int) -> bool:
    """Whether --fsdp has something to share out; alone, a process trains as without it."""
    return config.fsdp and world_size > 1


def build_mesh(shard_ranks: int, *, runtime: Runtime, timeout: timedelta = COLLECTIVE_TIMEOUT) -> DeviceMesh:
    """One axis if all ranks share one copy, else two: (replicate, shard). Collective: all ranks.

    Args:
        shard_ranks: ranks that share one copy; 0 is all of them.
        timeout: of the collectives within these groups.

    Raises:
        ValueError: the ranks are no multiple of ``shard_ranks``.
    """
    world_size, device_type = runtime.world_size, runtime.device.type
    shard_ranks = shard_ranks or world_size
    if world_size % shard_ranks:
        fitting = ", ".join(str(size) for size in range(2, world_size + 1) if world_size % size == 0)
        raise ValueError(
            f"--fsdp-shard-ranks {shard_ranks} does not divide the {world_size} processes of this job: "
            f"pass one of {fitting}, or 0 for all"
        )
    if shard_ranks == world_size:
        return DeviceMesh.from_group(cast(dist.ProcessGroup, dist.group.WORLD), device_type, mesh_dim_names=("shard",))
    key = (dist.group.WORLD, shard_ranks, timeout, device_type)
    if key in _MESHES:
        return _MESHES[key]
    ranks = torch.arange(world_size).view(-1, shard_ranks)  # [replicas, shard ranks]
    copy, place = divmod(runtime.rank, shard_ranks)
    # Only the members of a group meet: a thousand ranks need not wait for each other once per group.
    groups = [
        cast(dist.ProcessGroup, dist.new_group(members.tolist(), timeout=timeout, use_local_synchronization=True))
        for members in (ranks[:, place], ranks[copy])
    ]
    _MESHES.clear()  # of a world that is gone
    _MESHES[key] = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    return _MESHES[key]
