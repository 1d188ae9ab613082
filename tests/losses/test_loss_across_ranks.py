"""On 1, 2 and 4 gloo processes under DDP: the loss and every gradient of the joined batch, for all flags."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import current_runtime, run_ranks
from tests.tiny_clip import gradients, split, tiny_batch, tiny_clip
from training.config import EngineConfig, LossConfig
from training.distributed.collectives import all_reduce_sum, rank, world_size
from training.distributed.parallelize import parallelize
from training.losses import build_loss
from training.losses.build import LOSS_DIST_IMPLS

GLOBAL_BATCH = 16
CONFIGS = [
    *(LossConfig(local_loss=a, gather_with_grad=b) for a, b in itertools.product([False, True], repeat=2)),
    *(LossConfig(siglip=True, loss_dist_impl=impl) for impl in (None, *LOSS_DIST_IMPLS)),
]


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = [(config, bias, dtype) for config in CONFIGS for bias in (False, True) for dtype in TOLERANCE]


def loss_and_gradients(config: LossConfig, bias: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """On this rank's part of the global batch, wrapped as in training; the loss is averaged over ranks."""
    model = tiny_clip(bias=bias).to(dtype)
    trained = parallelize(model, config=EngineConfig(device="cpu"), runtime=current_runtime())
    batch = split(tiny_batch(GLOBAL_BATCH), world_size())[rank()]
    loss = build_loss(config)(*trained(batch.images.to(dtype), batch.texts))
    loss.backward()
    return all_reduce_sum(loss) / world_size(), gradients(model)


def all_cases() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [loss_and_gradients(*case) for case in CASES]


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To 1e-6 (fp32) or 1e-12 (fp64), of values above 1 relative to them."""
    tolerance = TOLERANCE[expected[0].dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def single():
    (found,) = run_ranks(1, all_cases)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_loss_and_every_gradient_equal_one_process_on_the_joined_batch(ranks, single):
    for per_rank in run_ranks(ranks, all_cases):
        for found, expected in zip(per_rank, single, strict=True):
            assert_same(found, expected)


def test_all_flags_of_one_loss_give_the_same_result(single):
    for siglip, bias, dtype in itertools.product([False, True], [False, True], TOLERANCE):
        first, *others = [
            found
            for found, (config, has_bias, of_dtype) in zip(single, CASES, strict=True)
            if (config.siglip, has_bias, of_dtype) == (siglip, bias, dtype)
        ]
        for found in others:
            assert_same(found, first)
