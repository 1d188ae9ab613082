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


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [B, E] -> [G, E]; B must be equal on all ranks.

    The backward pass sums over ranks what each of them computed for these rows, so that with gradients averaged over
    ranks afterwards (DDP) the mean over ranks of a per-rank loss has its exact gradient.
    """
    if world_size() == 1:
        return rows
    return cast(Tensor, _AllGatherRows.apply(rows))  # collective: all ranks


class GatheredRows:
    """Rows of all ranks on their way here: other work may be done until ``wait``. Made by ``gather_rows``.

    It does not hold the rows: their graph holds it, and in such a circle they would live until Python looks for some.
    """

    def __init__(self) -> None:
        self._coming: dist.Work | None = None
        self._going: tuple[Tensor, dist.Work] | None = None

    def wait(self) -> None:
        """Returns when the rows may be used: for a GPU, by what is put on its current stream afterwards."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def begin_return(self, gradient: Tensor) -> None:
        """Starts to bring each rank the sum of all ranks' gradients for its rows. Call it in the backward pass.

        Args:
            gradient: [G, ...] with respect to the gathered rows; the same tensor is then returned to autograd, and
                must not be changed any more.
        """
        if world_size() > 1:
            mine = gradient.new_empty((len(gradient) // world_size(), *gradient.shape[1:]))
            work = dist.reduce_scatter_tensor(mine, gradient, async_op=True)  # collective: all ranks, sum
            self._going = (mine, cast(dist.Work, work))


def gather_rows(rows: Tensor) -> tuple[Tensor, GatheredRows]:
    """Starts to gather rows of all ranks, [B, E] -> [G, E]; B must be equal on all ranks.

    Like ``all_gather_with_grad``, but neither pass waits for the network before it must: the backward pass of ``rows``
    begins with waiting for what ``begin_return`` has sent.

    Returns:
        [G, ...] in rank order, to be read after ``wait``, with a gradient that is given once, by ``begin_return``; and
        what has these two methods.
    """
    gathered = GatheredRows()
    if world_size() == 1:
        return rows, gathered
    return cast(Tensor, _GatherRowsAhead.apply(rows, gathered)), gathered


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


class _AllGatherRows(torch.autograd.Function):
    """One all-gather forward, one reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(summed, grad.contiguous())  # collective: all ranks, sum
        return summed


class _GatherRowsAhead(torch.autograd.Function):
    """One all-gather forward, one reduce-scatter backward, both begun early and waited for late."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gathered: GatheredRows) -> Tensor:
        everybody = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        work = dist.all_gather_into_tensor(everybody, rows.contiguous(), async_op=True)  # collective: all ranks
        gathered._coming = cast(dist.Work, work)
        ctx.gathered = gathered
        return everybody

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        going = ctx.gathered._going
        assert going is not None, "begin_return was not called"
        mine, work = going
        ctx.gathered._going = None
        work.wait()
        return mine, None
