"""The collectives that training code calls; with one process each of them is the identity.

Every function here except ``rank`` and ``world_size`` must be called by all ranks, in the same order.
Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def rank() -> int:
    """This process among all; 0 without a process group."""
    return dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if _is_distributed() else 1


class WayBack:
    """Brings each rank the sum of all ranks' gradients for its rows, while other gradients are computed."""

    def __init__(self) -> None:
        self._going: tuple[Tensor, dist.Work | None] | None = None

    def begin(self, gradient: Tensor) -> None:
        """Starts. Call it in the backward pass of whatever read the rows, as soon as the gradient is known.

        Always in the gradient's own type: a sum over a thousand ranks in bf16, which has 8 bits, would lose most of
        what the later ones add.

        Args:
            gradient: [G, ...] with respect to the gathered rows; it must not be changed any more.
        """
        ranks = world_size()
        if ranks == 1:
            self._going = gradient, None
            return
        mine = gradient.new_empty((len(gradient) // ranks, *gradient.shape[1:]))
        work = dist.reduce_scatter_tensor(mine, gradient, async_op=True)  # collective: all ranks, sum
        self._going = mine, cast(dist.Work, work)

    def end(self) -> Tensor:
        """[B, ...]: the sum for this rank's rows. For a GPU only what is put on its current stream later waits."""
        assert self._going is not None, "begin was not called"
        mine, work = self._going
        self._going = None
        if work is not None:
            work.wait()
        return mine


class GatheredRows:
    """Rows of all ranks on their way here: other work may be done until ``take``. Made by ``gather_rows``.

    A function that computes with the rows takes ``anchor`` as an argument in their place, and in its backward pass
    calls ``way_back.begin`` with their gradient instead of returning it: [G, ...] never passes through the graph.
    """

    def __init__(self, rows: Tensor, work: dist.Work | None, *, anchor: Tensor, way_back: WayBack) -> None:
        self._rows: Tensor | None = rows
        self._work = work
        self.anchor = anchor
        """0-D, with a gradient of nothing. It needs one if the rows do; if not, ``way_back`` must not begin."""
        self.way_back = way_back

    def take(self) -> Tensor:
        """[G, ...] in rank order, without gradient, and only once: who computes with them decides how long they live.

        For a GPU only what is put on its current stream afterwards waits for them.
        """
        rows, self._rows = self._rows, None
        assert rows is not None, "the rows have been taken"
        if self._work is not None:
            self._work.wait()
        return rows


def gather_rows(rows: Tensor, *, dtype: torch.dtype | None = None) -> GatheredRows:
    """Starts to gather rows of all ranks, [B, ...] -> [G, ...]; B must be equal on all ranks.

    Neither pass waits for the network before it must: the backward pass of ``rows`` begins with waiting for what
    ``way_back`` brings.

    Args:
        dtype: what rows are rounded to for the network, this rank's own among them, so that all ranks see the same;
            None keeps their type. Gradients are those of the rows given. With one process nothing is rounded.
    """
    way_back = WayBack()
    anchor = _Anchor.apply(rows, way_back)
    if world_size() == 1:
        return GatheredRows(rows.detach(), None, anchor=anchor, way_back=way_back)
    own = rows.detach().to(dtype or rows.dtype).contiguous()
    everybody = own.new_empty((world_size() * len(own), *own.shape[1:]))
    work = dist.all_gather_into_tensor(everybody, own, async_op=True)  # collective: all ranks
    return GatheredRows(everybody, cast(dist.Work, work), anchor=anchor, way_back=way_back)


def all_reduce_log_sum_exp(values: Tensor) -> Tensor:
    """log(sum over ranks of exp(value)), element by element, as a new tensor without gradient."""
    if world_size() == 1:
        return values.detach()
    largest = all_reduce_max(values)
    return largest + all_reduce_sum(torch.exp(values - largest)).log()


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; the number of rows may differ between ranks.

    Args:
        rows: [R, ...] with the same trailing shape and dtype on every rank; R may be 0.
    """
    if world_size() == 1:
        return rows.detach()
    counts = _all_gather(torch.tensor([rows.shape[0]], device=rows.device)).tolist()  # host sync
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    blocks = _all_gather(padded).split(max(counts))  # W x [max R, ...]
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Element-wise sum over ranks, as a new tensor without gradient."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Element-wise maximum over ranks, as a new tensor without gradient."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def broadcast_tensor(tensor: Tensor, source: int) -> Tensor:
    """Fills a contiguous tensor of any type, in place, with what it holds on rank ``source``; returns it."""
    if world_size() > 1 and tensor.numel() > 0:
        dist.broadcast(tensor.detach().view(-1).view(torch.uint8), src=source)  # collective: all ranks
    return tensor


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank. It is pickled: for decisions and names, not for tensors of a model."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)  # collective: all ranks, host sync
    return cast(T, box[0])


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in rank order, on every rank. They are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)  # collective: all ranks, host sync
    return values


def barrier() -> None:
    """Returns when all ranks have called it."""
    if world_size() > 1:
        dist.barrier()  # collective: all ranks, host sync


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_gather(rows: Tensor) -> Tensor:
    gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())  # collective: all ranks
    return gathered


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    reduced = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(reduced, op=operation)  # collective: all ranks
    return reduced


class _Anchor(torch.autograd.Function):
    """Stands for gathered rows in the graph. It holds the way back only: with the rows it would close a circle."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way_back: WayBack) -> Tensor:
        ctx.way_back = way_back
        ctx.set_materialize_grads(False)
        return rows.new_empty(())  # on the device of the rows, so that its backward pass runs where theirs does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: None) -> tuple[Tensor, None]:
        return ctx.way_back.end(), None
