"""What ranks exchange: bytes of gradients in fp32 or bf16, in buckets of what size, and equal on all of them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.launch import current_runtime, run_ranks
from tests.models.tiny import tiny_images, tiny_model, tiny_texts
from tests.test_train_step import build_step
from tests.tiny_clip import split, tiny_batch, tiny_clip
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import rank
from training.distributed.gradient_exchange import bucket_cap_mib, log_reduce_dtype
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.distributed.sharding import exchange_gradients
from training.resilience.replicas import replica_checksum
from training.validation import check_reduce_dtype

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"ddp_static_graph": True},
    "accumulated": {"accum_freq": 2},
    "accumulated static graph": {"accum_freq": 2, "ddp_static_graph": True},
}


def train_in_bf16() -> list[tuple[list[Tensor], Tensor]]:
    """Gradients and checksum of this rank after three steps without progress, for all cases."""
    found = []
    for settings in CASES.values():
        config = EngineConfig(device="cpu", grad_reduce_dtype="bf16", **settings)
        model = tiny_clip()
        step = build_step(model, trained=parallelize(model, config=config, runtime=current_runtime()))
        for _ in range(3):
            step(split(split(tiny_batch(16), 2)[rank()], config.accum_freq), lr=0.0)
        found.append(([parameter.grad for parameter in model.parameters()], replica_checksum(model, step.optimizer)))
    return found


def gradients_of_each_rank() -> list[list[Tensor]]:
    """Of rank 0 and rank 1, as each computes them before the exchange: the loss gathers features."""
    model = tiny_clip()
    step = build_step(model)
    step([split(tiny_batch(16), 2)[rank()]], lr=0.0)
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture(scope="module")
def own() -> list[list[Tensor]]:
    return run_ranks(2, gradients_of_each_rank)


@pytest.fixture(scope="module")
def in_bf16() -> list[list[tuple[list[Tensor], Tensor]]]:
    return run_ranks(2, train_in_bf16)


@pytest.mark.parametrize("case", CASES)
def test_sums_in_bf16_are_within_their_bound_and_equal_on_all_ranks(case: str, own: Any, in_bf16: Any) -> None:
    (first, checksum), (second, checksum_there) = (results[list(CASES).index(case)] for results in in_bf16)
    assert torch.equal(checksum, checksum_there)
    differs = False
    for mine, other, *parts in zip(first, second, *own, strict=True):
        assert torch.equal(mine, other)
        # What is added is rounded, and its sum; halves are exact.
        bound = 2 * 2**-8 * 1.01 * (parts[0].abs() + parts[1].abs()) / 2 + 1e-7
        error = (mine - (parts[0] + parts[1]) / 2).abs()
        assert (error <= bound).all()
        differs = differs or bool((error > 1e-6 * mine.abs().max()).any())
    assert differs, "rounded to nothing like bf16"


def gradients_of_two_steps() -> list[Tensor]:
    model = tiny_clip()
    step = build_step(model, trained=parallelize(model, config=EngineConfig(device="cpu"), runtime=current_runtime()))
    found = []
    for _ in range(2):
        step([split(tiny_batch(16), 4)[rank()]], lr=0.0)
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return found


def test_the_first_step_of_a_process_adds_up_as_any_other_does() -> None:
    # Four ranks: a sum of two is the same in either order.
    for first, second in run_ranks(4, gradients_of_two_steps):
        assert torch.equal(first, second)


def shard_in_bf16(accumulated: bool) -> list[tuple[torch.dtype, dict[str, Tensor]]]:
    """(type of the reduction, gradients) of FSDP in fp32 and bf16."""
    found = []
    for name in ("fp32", "bf16"):
        config = EngineConfig(device="cpu", fsdp=True, grad_reduce_dtype=name)
        model = tiny_model().train()
        parallelize(model, config=config, runtime=current_runtime())
        batches = DeviceBatch(tiny_images(4), tiny_texts(4)).images.chunk(2), tiny_texts(4).chunk(2)
        for last, images, texts in zip([not accumulated, True], *batches, strict=True):
            exchange_gradients(model, last)
            output = model(images * (1 + rank()), texts)
            (output.image_features * output.text_features).sum().backward()
        local = {key: parameter for key, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")}
        found.append({key: parameter.grad.full_tensor() for key, parameter in local.items()})
    return found


@pytest.mark.parametrize("accumulated", [False, True])
def test_shards_are_summed_in_bf16_too(accumulated: bool) -> None:
    for fp32, bf16 in run_ranks(2, shard_in_bf16, accumulated):
        scale = max(gradient.abs().max() for gradient in fp32.values())
        error = max((bf16[name] - fp32[name]).abs().max() for name in fp32) / scale
        assert 1e-5 < error < 2**-7


def test_buckets_grow_with_the_model_up_to_a_limit() -> None:
    def cap(gradient_mib: int) -> int | None:
        return bucket_cap_mib(nn.Linear(2**18, gradient_mib, bias=False, device="meta"))

    assert [cap(size) for size in (100, 416, 1600, 100_000)] == [None, 26, 100, 200]
    locked = nn.Linear(2**18, 1600, bias=False, device="meta").requires_grad_(False)
    assert bucket_cap_mib(locked) is None


@pytest.mark.parametrize(
    ("name", "world_size", "dtype", "is_sharded", "line"),
    [
        ("bf16", 1, torch.float32, False, "--grad-reduce-dtype bf16 has no effect"),
        ("bf16", 2, torch.float32, False, "summed over ranks in bf16"),
        ("fp32", 2, torch.bfloat16, False, "weights in bf16 are summed over 2 ranks in that type: only --fsdp"),
        ("fp32", 2, torch.float16, False, "weights in fp16"),
        ("fp32", 2, torch.bfloat16, True, None),
        ("fp32", 2, torch.float32, False, None),
        ("fp32", 1, torch.bfloat16, False, None),
    ],
)
def test_a_run_says_in_which_type_it_sums(
    name: str, world_size: int, dtype: torch.dtype, is_sharded: bool, line: str | None, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        log_reduce_dtype(nn.Linear(2, 2, dtype=dtype), name, world_size=world_size, is_sharded=is_sharded)
    assert line in caplog.text if line else not caplog.text


@pytest.mark.parametrize("fsdp", [False, True])
def test_sums_of_many_ranks_in_bf16_are_refused(fsdp: bool) -> None:
    config = EngineConfig(device="cpu", fsdp=fsdp, grad_reduce_dtype="bf16")
    check_reduce_dtype(config, world_size=64)
    with pytest.raises(ValueError, match="--grad-reduce-dtype bf16 over 65 ranks: .* Use fp32"):
        parallelize(tiny_clip(), config=config, runtime=Runtime(0, 0, 65, torch.device("cpu")))


def ring_error(ranks: int, *, equal: bool) -> float:
    """Of the mean of many ranks' gradients in bf16, added one after the other, relative to its norm."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(20_000, generator=generator)
    found, exact = torch.zeros_like(common, dtype=torch.bfloat16), torch.zeros_like(common, dtype=torch.float64)
    for _ in range(ranks):
        own = common if equal else torch.randn(20_000, generator=generator)
        exact += own.double() / ranks
        found += own.bfloat16().div_(ranks)
    return float((found.double() - exact).norm() / exact.norm())


def test_the_document_has_the_errors_of_a_ring_that_adds_in_bf16() -> None:
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert [int(ranks) for ranks, *_ in rows] == [8, 64, 96, 256, 1024]
    for ranks, *errors in rows:
        for equal, error in zip((True, False), errors, strict=True):
            assert 100 * ring_error(int(ranks), equal=equal) == pytest.approx(float(error), rel=0.1)
