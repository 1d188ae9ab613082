"""What this rank holds of a model whose parameters are spread over ranks (FSDP2), as plain tensors.

    parameter [R, ...]  ->  rank i holds rows [i * C, (i + 1) * C), with C = ceil(R / ranks of a copy)

FSDP's own view is a DTensor per parameter. Whatever works on values alone (optimizer, clipping, guard, telemetry,
checkpoints) gets the rows of this rank instead: an ordinary parameter in the same memory. It never has to know of the
sharding, except where it needs one number for a whole tensor: that is what ``ShardSums`` is for.

Without FSDP every function here gives the model as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from training.distributed.collectives import all_reduce_sum, broadcast_tensor, world_size


class Placement(NamedTuple):
    """Which rows of a parameter this rank holds."""

    full_shape: tuple[int, ...]
    start: int
    """First row, along dim 0."""
    rows: int
    """0 on ranks that a short parameter does not reach."""


class ShardGroup(NamedTuple):
    """This rank's place among those that share one copy of the model, and which copy that is."""

    index: int  # type: ignore[assignment]  # hides a method of tuple that nobody needs here
    size: int
    replica: int
    replicas: int
    """Copies; more than one with HSDP."""


@dataclass(frozen=True)
class _Sharding:
    group: ShardGroup
    process_group: dist.ProcessGroup
    """The ranks of this copy."""
    device: torch.device
    """That they exchange tensors on; shards may be in host memory."""
    sharded: Mapping[str, nn.Parameter]
    """FSDP's own parameters."""
    local: dict[str, nn.Parameter] = field(default_factory=dict)
    """All parameters of the model, in its order."""
    placements: dict[str, Placement] = field(default_factory=dict)


_SHARDINGS: WeakKeyDictionary[nn.Module, _Sharding] = WeakKeyDictionary()


def shard_group(model: nn.Module) -> ShardGroup | None:
    """None for a model that is whole on every rank.

    Args:
        model: the plain one, as for every function here.
    """
    sharding = _SHARDINGS.get(model)
    return None if sharding is None else sharding.group


def placements(model: nn.Module) -> dict[str, Placement]:
    """By name, of the parameters that are spread; those of a single element (``logit_scale``) are whole everywhere."""
    sharding = _SHARDINGS.get(model)
    return {} if sharding is None else dict(sharding.placements)


def local_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What this rank trains, by name in the model's order: the parameters, or their rows. The same objects every time.

    The rows of a parameter share its memory: what is written to them is in the model.
    """
    sharding = _SHARDINGS.get(model)
    return dict(model.named_parameters() if sharding is None else sharding.local)


def local_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` with the rows of this rank instead of parameters that are spread; nothing is copied."""
    reshard(model)
    return {
        name: value.to_local().detach() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def register_sharding(model: nn.Module) -> None:
    """Notes where the parameters are. Once, after ``fully_shard`` and when they are on their device.

    Raises:
        RuntimeError: FSDP has left nothing to this function, or has cut parameters in a way of its own.
    """
    reshard(model)
    named = dict(model.named_parameters())
    sharded = {name: parameter for name, parameter in named.items() if isinstance(parameter, DTensor)}
    if not sharded:
        raise RuntimeError("FSDP has sharded no parameter of the model: train it without --fsdp")
    mesh = cast(DTensor, next(iter(sharded.values()))).device_mesh
    replica, replicas = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
    shard_axis = mesh.ndim - 1
    group = ShardGroup(mesh.get_local_rank(shard_axis), mesh.size(shard_axis), replica, replicas)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    sharding = _Sharding(group, mesh.get_group(shard_axis), device, sharded)
    for name, parameter in named.items():
        if name not in sharded:
            sharding.local[name] = parameter
            continue
        rows = cast(DTensor, parameter).to_local().detach()
        sharding.local[name] = nn.Parameter(rows, requires_grad=parameter.requires_grad)
        sharding.placements[name] = _placement(tuple(parameter.shape), rows, group, name=name)
    _SHARDINGS[model] = sharding


def sharding_device(model: nn.Module) -> torch.device | None:
    """That the ranks of a sharded model exchange tensors on; its shards may be in host memory."""
    sharding = _SHARDINGS.get(model)
    return None if sharding is None else sharding.device


def sum_over_copy(model: nn.Module, values: Tensor) -> Tensor:
    """Element-wise sum over the ranks that share this rank's copy, as a new tensor. Collective: all ranks."""
    total = values.clone()
    dist.all_reduce(total, group=_SHARDINGS[model].process_group)  # collective: all ranks
    return total


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights: the next forward pass gathers what the rows hold by then.

    FSDP keeps some of them after a forward pass without a backward pass, and does not see that somebody writes to rows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def begin_step(model: nn.Module) -> None:
    """Before a step's first forward pass: weights are gathered anew, and BatchNorm's statistics are rank 0's.

    DDP does the latter too. Collective with BatchNorm: all ranks.
    """
    if model not in _SHARDINGS:
        return
    reshard(model)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    _send_together([buffer for norm in norms for buffer in norm.buffers()])  # collective: all ranks


def _send_together(buffers: Sequence[Tensor]) -> None:
    """Rank 0's values on every rank, in one message for each type. Collective: all ranks."""
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = broadcast_tensor(torch.cat([buffer.reshape(-1) for buffer in same]), 0)  # collective: all ranks
        for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
            buffer.copy_(values.view_as(buffer))


def exchange_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward passes exchange gradients; without, they add up on each rank, unsharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def take_gradients(model: nn.Module) -> None:
    """After the last backward pass: moves gradients from FSDP's parameters to ``local_parameters``, without copies.

    Those of whole parameters are averaged here, for FSDP leaves them alone. Collective: all ranks.
    """
    sharding = _SHARDINGS.get(model)
    if sharding is None:
        return
    for name, parameter in sharding.sharded.items():
        gradient, parameter.grad = parameter.grad, None
        sharding.local[name].grad = None if gradient is None else cast(DTensor, gradient).to_local()
    whole = [
        parameter.grad
        for name, parameter in sharding.local.items()
        if name not in sharding.placements and parameter.grad is not None
    ]
    if whole:
        flat = torch.cat([gradient.reshape(-1).float() for gradient in whole])
        means = all_reduce_sum(flat) / world_size()  # collective: all ranks
        for gradient, mean in zip(whole, means.split([gradient.numel() for gradient in whole]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class ShardSums:
    """Sums over whole tensors from sums over this rank's rows."""

    def __init__(self, model: nn.Module) -> None:
        sharding = _SHARDINGS[model]
        self._process_group, self.device = sharding.process_group, sharding.device
        counts_whole = sharding.group.index == 0
        self._counts = {
            parameter: counts_whole or name in sharding.placements for name, parameter in sharding.local.items()
        }
        self._sizes = {
            sharding.local[name]: torch.Size(place.full_shape).numel() for name, place in sharding.placements.items()
        }
        # Made once for the same parameters: a copy from the host would wait for the device.
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def size(self, parameter: Tensor) -> int:
        """Elements of the whole tensor."""
        return self._sizes.get(cast(nn.Parameter, parameter), parameter.numel())

    def __call__(self, sums: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Adds up over the ranks of this copy. Collective: all ranks, for the same parameters; no host sync.

        Args:
            sums: [..., T], one for each of the parameters; new in the result.
        """
        key = tuple(map(id, parameters))
        if key not in self._masks:
            counts = [self._counts[cast(nn.Parameter, parameter)] for parameter in parameters]
            self._masks[key] = torch.tensor(counts, device=self.device)
        own = sums.to(self.device)
        total = torch.where(self._masks[key], own, torch.zeros_like(own))
        dist.all_reduce(total, group=self._process_group)  # collective: all ranks
        return total.to(sums.device)  # host sync if shards are in host memory

    def of_each(self, sums: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """The same for several vectors in one exchange; each result is where its argument was. Collective: all ranks.

        Args:
            parameters: of all vectors, in order.
        """
        total = self(torch.cat([part.to(self.device) for part in sums]), parameters)
        parts = total.split([len(own) for own in sums])
        return [part.to(own.device) for own, part in zip(sums, parts, strict=True)]

    def norm(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """L2 norm of all of them together, 0-D, on the device. Collective: all ranks; no host sync."""
        norms = torch._foreach_norm([gradient for _, gradient in gradients], dtype=torch.float32)
        squares = torch.stack([norm.to(self.device) for norm in norms]).square()
        return self(squares, [parameter for parameter, _ in gradients]).sum().sqrt()


def shard_sums(model: nn.Module) -> ShardSums | None:
    """None for a model that is whole on every rank, where a sum over a tensor is that."""
    return ShardSums(model) if model in _SHARDINGS else None


def _placement(full_shape: tuple[int, ...], rows: Tensor, group: ShardGroup, *, name: str) -> Placement:
    chunk = -(-full_shape[0] // group.size)
    start = min(group.index * chunk, full_shape[0])
    expected = (min(chunk, full_shape[0] - start), *full_shape[1:])
    if tuple(rows.shape) != expected and not (rows.numel() == 0 and expected[0] == 0):
        raise RuntimeError(
            f"FSDP holds {tuple(rows.shape)} of {name} {full_shape} on rank {group.index} of {group.size}, not the "
            f"{expected} that checkpoints count on: use a torch from 2.11 to 2.15"
        )
    return Placement(full_shape, start, expected[0])
