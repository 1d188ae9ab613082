"""Compares the ranks' copies of the training state bit by bit, and names those that differ.

Replicas start equal and make equal updates, so any difference is a fault: a flipped bit, a broken device, or an update
that one rank made alone. The loss hides it, and every checkpoint is written from one rank's copy.

    weights, moments, step counts --> one 64-bit sum per tensor, on the device --> all ranks' sums on each rank

With FSDP a rank's shard has no second copy, and only what is whole on every rank can be compared: parameters of a
single element with their moments, and what the caller adds. With HSDP whole copies are compared: the ranks of each add
up their sums, tensor by tensor, and a shard that differs names all ranks of its copy, which have computed with it.

A sum weighs every element's bits, read as an integer, with an odd number of its own (mod 2^64). So a single changed
element always shows, wherever it is; two swapped ones, or many changed, go unseen with a chance of 2^-32 at most.

Legend: T tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from training.distributed.sharding import local_parameters, placements, shard_group, sharding_device, sum_over_copy

_CHUNK_ELEMENTS = {"cpu": 2**15, "cuda": 2**22}
"""Elements whose products are in memory at once. On the CPU just so many that one thread does it: threads that wait for
each other after every chunk cost more than they save where other ranks compute on the same cores."""
_CHUNK_FACTOR = 0x9E3779B97F4A7C15 - 2**64
"""Odd, so that it can be undone mod 2^64; 2^64 over the golden ratio, as a signed number."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""By size of an element; the longest in two halves."""


def replica_checksum(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """One sum for every weight and every tensor of the optimizer's state: int64 [T] on the device. No host sync.

    With HSDP collective: all ranks. With shards in host memory it waits for the device.

    Buffers are left out: the running statistics of BatchNorm are each rank's own between two steps.
    """
    compared = [(spread, _checksum(tensor)) for _, spread, tensor in _replicated(model, optimizer)]
    device = sharding_device(model) or next(model.parameters()).device
    sums = torch.stack([value.to(device) for _, value in compared])
    group = shard_group(model)
    if group is None or group.replicas == 1:
        return sums
    # An odd factor for each shard, so that equal changes of two do not make up for each other.
    of_copy = sum_over_copy(model, sums * (2 * group.index + 1))  # collective: all ranks
    return torch.where(torch.tensor([spread for spread, _ in compared], device=device), of_copy, sums)


def checksum_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What the entries of ``replica_checksum`` belong to: ``visual.proj``, ``visual.proj//exp_avg``."""
    return [name for name, _, _ in _replicated(model, optimizer)]


def compare_replicas(checksum: Tensor, gather: Callable[[list[int]], list[list[int]]]) -> list[int]:
    """Ranks whose state differs from that of most ranks; empty when all agree. Collective: all ranks; host sync.

    Without a majority (two ranks, or two halves) nobody can say who is right, and all ranks are named.

    Args:
        gather: the values of all ranks in rank order, on every rank (``gather_objects``).
    """
    return differing_ranks(gather(checksum.tolist()))


def differing_ranks(checksums: Sequence[Sequence[int]]) -> list[int]:
    """The ranks, given everybody's checksums in rank order."""
    keys = [tuple(checksum) for checksum in checksums]
    common, holders = Counter(keys).most_common(1)[0]
    if holders == len(keys):
        return []
    if 2 * holders <= len(keys):
        return list(range(len(keys)))
    return [rank for rank, key in enumerate(keys) if key != common]


def differing_tensors(checksums: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """The tensors on which ranks disagree: one is a flipped bit, all of them are an update that a rank made alone."""
    return [name for name, *sums in zip(names, *checksums, strict=True) if len(set(sums)) > 1]


def _replicated(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, bool, Tensor]]:
    """(name, whether this rank has a shard of it, tensor) of all that has a second copy somewhere."""
    group, sharded = shard_group(model), placements(model)
    for name, parameter in local_parameters(model).items():
        spread = name in sharded
        if spread and group is not None and group.replicas == 1:
            continue
        yield name, spread, parameter.detach()
        state = optimizer.state.get(parameter, {})
        for key in sorted(state):
            if isinstance(state[key], Tensor):
                yield f"{name}//{key}", spread, state[key]


def _checksum(tensor: Tensor) -> Tensor:
    """int64 []: the sum over elements of bits * (2 * position + 1), in chunks that are told apart as well."""
    # Any order of memory would do as long as it is the same on all ranks; the logical one is.
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    if not len(bits):  # a short tensor does not reach every shard
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    length = min(_CHUNK_ELEMENTS.get(tensor.device.type, _CHUNK_ELEMENTS["cuda"]), len(bits))
    factors = torch.arange(1, 2 * length, 2, dtype=torch.int64, device=tensor.device)
    products = torch.empty_like(factors)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(length):
        part = torch.mul(chunk, factors[: len(chunk)], out=products[: len(chunk)]).sum()
        total = total * _CHUNK_FACTOR + part
    return total
