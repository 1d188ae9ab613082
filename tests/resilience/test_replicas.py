"""Replica checksums: what they see, and whom they name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.distributed.launch import current_runtime, run_ranks
from tests.tiny_clip import tiny_batch, tiny_clip
from training.config import EngineConfig, LossConfig, OptimConfig
from training.distributed.collectives import gather_objects
from training.distributed.parallelize import parallelize
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience import replicas
from training.resilience.replicas import (
    checksum_names,
    compare_replicas,
    differing_ranks,
    differing_tensors,
    replica_checksum,
)
from training.train_step import TrainStep

CPU = torch.device("cpu")


class Holder(nn.Module):
    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)


def checksum(*tensors: torch.Tensor) -> list[int]:
    model = Holder(*tensors)
    return replica_checksum(model, torch.optim.SGD(model.parameters(), lr=1.0)).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_single_bit_counts(dtype, monkeypatch):
    monkeypatch.setitem(replicas._CHUNK_ELEMENTS, "cpu", 2)
    values = torch.randn(5, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, seen = checksum(values), set()
    for place in range(5 * values.element_size() * 8):
        flipped = values.clone()
        flipped.view(torch.uint8)[place // 8] ^= 1 << place % 8
        seen.add(tuple(checksum(flipped)))
    assert tuple(plain) not in seen
    assert len(seen) == 5 * values.element_size() * 8


def test_swapped_values_are_seen_within_and_across_chunks(monkeypatch):
    monkeypatch.setitem(replicas._CHUNK_ELEMENTS, "cpu", 4)
    values = 2.0 ** torch.arange(12)  # few bits differ between them
    plain = checksum(values)
    for first in range(12):
        for second in range(first):
            swapped = values.clone()
            swapped[[first, second]] = values[[second, first]]
            assert checksum(swapped) != plain


def test_zeros_of_both_signs_and_every_nan_are_told_apart():
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    values = torch.zeros(1), -torch.zeros(1), torch.tensor([torch.nan]), nan
    assert len({tuple(checksum(value)) for value in values}) == 4


def test_moments_and_step_counts_are_part_of_it():
    model = tiny_clip()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.9, eps=1e-6))
    model(tiny_batch(4).images, tiny_batch(4).texts).image_features.sum().backward()
    optimizer.step()
    names, plain = checksum_names(model, optimizer), replica_checksum(model, optimizer).tolist()
    assert {"visual.proj.weight", "visual.proj.weight//exp_avg_sq", "visual.proj.weight//step"} <= {*names}
    optimizer.state[model.visual.proj.weight]["exp_avg_sq"][0, 0] += 1
    changed = replica_checksum(model, optimizer).tolist()
    assert differing_tensors([plain, changed], names) == ["visual.proj.weight//exp_avg_sq"]


def test_memory_layout_does_not_count():
    kernel = torch.randn(2, 3, 4, 4)
    assert checksum(kernel) == checksum(kernel.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("checksums", "named"),
    [
        ([1], []),
        ([1, 1], []),
        ([1, 2], [0, 1]),
        ([1, 1, 2], [2]),
        ([5, 1, 1, 6, 1], [0, 3]),
        ([1, 2, 1, 2], [0, 1, 2, 3]),
        ([1, 2, 3], [0, 1, 2]),
    ],
)
def test_ranks_against_a_majority_are_named_and_without_one_all(checksums, named):
    assert differing_ranks([[value, 0] for value in checksums]) == named


def _flip_one_bit_on_the_last_rank(flips: bool) -> list[list[int]]:
    runtime = current_runtime()
    model = tiny_clip()
    wrapped = parallelize(model, config=EngineConfig(device="cpu"), runtime=runtime)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.9, eps=1e-6))
    step = TrainStep(
        model=wrapped,
        loss=build_loss(LossConfig(local_loss=True)),
        optimizer=optimizer,
        precision=build_precision("fp32", CPU),
    )
    found = []
    for number in range(3):
        step([tiny_batch(4, seed=runtime.rank)], lr=1e-3)
        if flips and number == 0 and runtime.rank == runtime.world_size - 1:
            # Not the last bit: the next update may round that away again.
            model.visual.proj.weight.data.view(torch.int32)[0, 0] ^= 1 << 12
        found.append(compare_replicas(replica_checksum(model, optimizer), gather_objects))
    return found


@pytest.mark.parametrize(("world_size", "named"), [(2, [0, 1]), (3, [2])])
def test_one_flipped_bit_is_found_and_the_rank_named(world_size, named):
    for found in run_ranks(world_size, _flip_one_bit_on_the_last_rank, True):
        assert found == [named] * 3


def test_ranks_that_train_together_agree():
    assert run_ranks(2, _flip_one_bit_on_the_last_rank, False) == [[[]] * 3] * 2
