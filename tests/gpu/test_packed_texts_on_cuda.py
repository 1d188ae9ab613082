"""Packed texts on a real device: torch's variable-length kernels and the groups agree, and nothing waits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from models.packed_attention import has_varlen_kernel
from models.packing import pack_texts
from tests.gpu.builders import build_batch, build_model, build_step
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime

pytestmark = pytest.mark.gpu
LENGTHS = [1, 3, 8, 5, 2, 8, 7, 4, 6, 8, 1, 2, 3, 4, 5, 6]


def ragged_batch(device: torch.device, *, packed: bool, lengths: list[int] | None = None) -> DeviceBatch:
    """Captions of many lengths, at most the demo model's context."""
    lengths = lengths or LENGTHS
    _, config = build_model(torch.device("cpu"))
    images, texts = build_batch(config, len(lengths), torch.device("cpu"))[:2]
    texts = texts.clamp(max=49_000)
    texts[torch.arange(len(texts)), torch.tensor(lengths) - 1] = 49_407
    form = pack_texts(texts, multiple=8) if packed else texts
    return DeviceBatch(images.to(device), form.to(device))


def gradients(device: torch.device, *, packed: bool, precision: str) -> dict[str, Tensor]:
    model, _ = build_model(device)
    step = build_step(model, device, precision=precision)
    loss = step([ragged_batch(device, packed=packed)], lr=0.0).loss
    return {"loss": loss.float(), **{name: p.grad.float() for name, p in model.named_parameters()}}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative to their length."""
    difference = torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm()
    return (difference / torch.stack([value.norm() for value in expected.values()]).norm()).item()


def test_half_precision_takes_the_varlen_kernel_and_fp32_the_groups(device):
    assert has_varlen_kernel(torch.empty(1, 64, device=device, dtype=torch.bfloat16))
    assert not has_varlen_kernel(torch.empty(1, 64, device=device))
    assert not has_varlen_kernel(torch.empty(1, 68, device=device, dtype=torch.bfloat16))


def test_fp32_gradients_of_packed_texts_are_those_of_padded_ones(device):
    found, expected = (gradients(device, packed=packed, precision="fp32") for packed in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_half_precision_gradients_of_packed_texts_stay_within_the_noise_of_padded_ones(device, precision):
    exact = gradients(device, packed=False, precision="fp32")
    packed, padded = (gradients(device, packed=form, precision=precision) for form in (True, False))
    assert distance(packed, exact) <= 1.5 * distance(padded, exact)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_step_on_packed_texts_never_waits_for_the_device(device, precision):
    model, _ = build_model(device)
    step = build_step(model, device, precision=precision)
    batches = [ragged_batch(device, packed=True, lengths=lengths) for lengths in (LENGTHS, LENGTHS[:8] * 2)]
    step([batches[0]], lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([batches[1]], lr=1e-3)
        batches[1].texts.first(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_take_every_batch_with_one_program_each(device, checkpointing):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, _ = build_model(device)
    engine = EngineConfig(device=str(device), torchcompile=True, grad_checkpointing=checkpointing)
    trained = parallelize(model, config=engine, runtime=Runtime(rank=0, local_rank=0, world_size=1, device=device))
    step = build_step(model, device, precision="amp_bf16", trained=trained)
    ragged = partial(ragged_batch, device, packed=True)
    for shift in range(5):
        step([ragged(lengths=[1 + (length + shift) % 8 for length in LENGTHS])], lr=1e-3)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4
