"""Every collective on two ranks, and as the identity on one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launch import RankError, run_ranks
from training.distributed import collectives


def all_of_them() -> dict[str, object]:
    rank = collectives.rank()
    rows = torch.full((2, 3), float(rank + 1), requires_grad=True)
    gathering = collectives.gather_rows(rows)
    gathered = gathering.take()
    gathering.way_back.begin(torch.arange(1.0, len(gathered) + 1)[:, None].expand_as(gathered) * (rank + 1))
    gathering.anchor.backward()
    ragged = torch.full((3 * rank, 2), rank, dtype=torch.int64)
    collectives.barrier()
    return {
        "place": (rank, collectives.world_size()),
        "gathered": gathered,
        "gradient": rows.grad,
        "ragged": collectives.all_gather_rows(ragged),
        "sum": collectives.all_reduce_sum(torch.tensor([1.0, rank])),
        "max": collectives.all_reduce_max(torch.tensor([1.0, rank])),
        "tensors": [
            collectives.broadcast_tensor(torch.full((2, 2), rank, dtype=dtype), collectives.world_size() - 1)
            for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64)
        ],
        "number": collectives.broadcast_tensor(torch.tensor(float(rank)), 0),
        "first": collectives.broadcast_object({"from": rank}),
        "all": collectives.gather_objects(f"rank {rank}"),
    }


def test_with_one_process_all_of_them_are_the_identity():
    found = all_of_them()
    assert found["place"] == (0, 1)
    assert torch.equal(found["gathered"], torch.ones(2, 3))
    assert torch.equal(found["gradient"], torch.tensor([1.0, 2.0])[:, None].expand(2, 3))
    assert found["ragged"].shape == (0, 2)
    assert torch.equal(found["sum"], torch.tensor([1.0, 0.0]))
    assert (found["first"], found["all"]) == ({"from": 0}, ["rank 0"])


def test_with_two_processes_each_sees_the_same_and_gets_the_gradient_of_both():
    for rank, found in enumerate(run_ranks(2, all_of_them)):
        assert found["place"] == (rank, 2)
        assert torch.equal(found["gathered"], torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 3))
        # Row i weighs i + 1 in the loss of rank 0 and twice that in the loss of rank 1: 3 (i + 1) together.
        own = torch.tensor([3.0, 6.0]) if rank == 0 else torch.tensor([9.0, 12.0])
        assert torch.equal(found["gradient"], own[:, None].expand(2, 3))
        assert torch.equal(found["ragged"], torch.ones(3, 2, dtype=torch.int64))
        assert torch.equal(found["sum"], torch.tensor([2.0, 1.0]))
        assert torch.equal(found["max"], torch.tensor([1.0, 1.0]))
        assert (found["first"], found["all"]) == ({"from": 0}, ["rank 0", "rank 1"])
        assert [tensor.float().tolist() for tensor in found["tensors"]] == [[[1.0, 1.0], [1.0, 1.0]]] * 4
        assert found["number"] == 0.0


def raise_on_rank_one() -> None:
    if collectives.rank() == 1:
        raise KeyError("only here")


def test_the_launcher_brings_back_the_traceback_of_a_rank():
    with pytest.raises(RankError, match=r"(?s)rank 1 raised:.*raise_on_rank_one.*KeyError: 'only here'"):
        run_ranks(2, raise_on_rank_one)
