"""What the losses keep and send: never the B x G logits, and texts only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.launch import run_ranks
from training.losses.clip_loss import ClipLoss
from training.losses.siglip_loss import SiglipLoss
from training.losses.tiles import tiles

LOSSES = [ClipLoss, SiglipLoss]
ROWS, EMBEDDING, TILE = 64, 4, 256


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def features(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = F.normalize(torch.randn(2, ROWS, EMBEDDING, generator=generator), dim=-1)
    return [images.requires_grad_(), texts.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_a_tile_or_the_gathered_texts(loss):
    inputs = features()
    with LargestResult() as largest:
        loss(tile_elements=TILE)(*inputs, None).backward()
    assert largest.elements == max(TILE, ROWS * EMBEDDING) < ROWS * ROWS


def test_texts_in_lower_precision_are_raised_by_no_more_than_a_tile_at_a_time():
    images, texts = torch.ones(2, 32), torch.ones(64, 32, dtype=torch.bfloat16)
    assert {tile.texts.numel() for tile in tiles(images, texts, first=0, elements=TILE)} == {TILE}
    assert {tile.texts.dtype for tile in tiles(images, texts, first=0, elements=TILE)} == {torch.float32}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_waits_for_the_backward_pass_grows_with_the_texts_only(loss):
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss(tile_elements=TILE)(*features(), None)
    assert max(kept) == ROWS * EMBEDDING


@pytest.mark.parametrize("first", [0, 3, 10])
@pytest.mark.parametrize("elements", [1, 6, 21, 1000])
def test_every_pair_lies_in_one_tile(first, elements):
    images, texts = torch.eye(5, 16), torch.eye(16)
    found = [tile.pairs.clone() for tile in tiles(images.roll(first, 1), texts, first=first, elements=elements)]
    assert torch.cat(found).tolist() == [1.0] * 5


def count_collectives(loss_name: str) -> dict[str, int]:
    """Elements that this rank sends or receives in one step, by collective."""
    counted: dict[str, int] = {}

    def counting(name: str, size_of: int) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] = counted.get(name, 0) + args[size_of].numel()
            return original(*args, **kwargs)

        return call

    for name, size_of in (("all_gather_into_tensor", 0), ("reduce_scatter_tensor", 1), ("all_reduce", 0)):
        setattr(dist, name, counting(name, size_of))
    {"ClipLoss": ClipLoss, "SiglipLoss": SiglipLoss}[loss_name]()(*features(dist.get_rank()), None).backward()
    return counted


def test_texts_are_gathered_once_and_their_gradient_comes_back_once():
    texts = 2 * ROWS * EMBEDDING
    expected = {"all_gather_into_tensor": texts, "reduce_scatter_tensor": texts}
    assert run_ranks(2, count_collectives, "SiglipLoss") == [expected] * 2
    normalisers = {"all_reduce": 2 * 2 * ROWS}
    assert run_ranks(2, count_collectives, "ClipLoss") == [expected | normalisers] * 2
