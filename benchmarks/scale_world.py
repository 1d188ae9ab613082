"""One rank among many that do not exist: torch's fake process group, and who called it for how many bytes.

A collective of the fake group returns at once. It gathers W copies of the rank's own tensor, and leaves sums as they
are; here a sum over ranks becomes that of W ranks which hold the same, so that what depends on it (the guard's count of
finite losses, DDP's average) is what it would be.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.distributed.runtime import Runtime

_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}


class Call(NamedTuple):
    """One collective."""

    kind: str
    num_bytes: int
    """Of the whole tensor: what is reduced, what a gather returns, what a reduce-scatter takes."""
    elements: int
    group_size: int


class CollectiveLog(TorchDispatchMode):
    """Writes down every collective, DDP's and FSDP's among them, and makes sums what W equal ranks would give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            kind = _KINDS.get(name, name)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
            group = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)), None)
            size = _group_size(group)
            if kind == "all_reduce":
                if _is_sum(args):
                    for tensor in tensors:
                        tensor.mul_(size)  # that many ranks hold the same
                if name == "allreduce_":
                    result = (args[0], _done(list(args[0])))
            nbytes, elements = (0, 0) if largest is None else (largest.nbytes, largest.numel())
            if name == "allgather_":
                nbytes, elements = (sum(tensor.nbytes for tensor in tree_leaves(args[0])), size * elements)
            self.calls.append(Call(kind, nbytes, elements, size))
        return result

    def summary(self) -> dict[str, dict[str, int]]:
        """By kind: how many, and bytes."""
        counts, sizes = Counter(call.kind for call in self.calls), Counter[str]()
        for call in self.calls:
            sizes[call.kind] += call.num_bytes
        return {kind: {"calls": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)}


@contextmanager
def fake_world(size: int, *, rank: int = 0) -> Iterator[tuple[Runtime, CollectiveLog]]:
    """This process as one rank of ``size``, and the log of what it calls."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with CollectiveLog() as log:
            yield Runtime(rank, rank % 8, size, torch.device("cpu")), log
    finally:
        dist.destroy_process_group()


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that exist at once, whoever allocates them; also of fake tensors, which have none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, once, until it goes."""
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known[id(storage)] = storage
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def _done(tensors: list[Tensor]) -> Any:
    """A finished work with its result, which DDP looks at; the fake group's own has none."""
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future).boxed()


def _is_sum(args: tuple[Any, ...]) -> bool:
    """Of an all-reduce's arguments, whether its operation is a sum (an average of equals changes nothing)."""
    operation = args[2] if len(args) > 2 else None
    return operation is None or "SUM" in _operation_name(operation)


def _operation_name(operation: Any) -> str:
    try:
        return str(dist.ReduceOp.unbox(operation).op)
    except (AttributeError, TypeError, RuntimeError):
        return str(operation)


def _group_size(group: Any) -> int:
    try:
        return int(dist.ProcessGroup.unbox(group).size())
    except (AttributeError, TypeError, RuntimeError):
        return dist.get_world_size()
