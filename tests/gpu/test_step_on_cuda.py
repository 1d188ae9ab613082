"""The train step on a real device: same numbers as the CPU, no waiting for the device, bounded memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.end_to_end.host_waits import watch_steps
from tests.gpu.builders import MODEL, build_batch, build_model, build_step, weights
from training.config import EngineConfig
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.main import main

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def test_fp32_features_equal_those_of_the_cpu(device):
    on_cpu, config = build_model(CPU)
    on_cuda, _ = build_model(device)
    with torch.no_grad():
        expected = on_cpu(*build_batch(config, 8, CPU))
        found = on_cuda(*build_batch(config, 8, device))
    torch.testing.assert_close(found.image_features.cpu(), expected.image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_features.cpu(), expected.text_features, rtol=0, atol=1e-5)


def test_fp32_losses_follow_those_of_the_cpu_over_steps(device):
    losses = {}
    for place in (CPU, device):
        model, config = build_model(place)
        step = build_step(model, place, precision="fp32")
        losses[place.type] = [step([build_batch(config, 8, place, seed=n)], lr=1e-4).loss.item() for n in range(3)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_a_low_precision_step_is_finite_and_learns_one_batch(device, precision):
    model, config = build_model(device)
    step = build_step(model, device, precision=precision)
    dtype = torch.float32 if precision == "amp_bf16" else torch.bfloat16
    batch = build_batch(config, 32, device)
    batch = batch._replace(images=batch.images.to(dtype))
    losses = [step([batch], lr=1e-3).loss.item() for _ in range(20)]
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert losses[-1] < losses[0] - 0.5


def test_a_step_never_waits_for_the_device(device):
    model, config = build_model(device)
    step = build_step(model, device, precision="amp_bf16", clip=1.0)
    batch = build_batch(config, 16, device)
    step([batch], lr=1e-3)  # the first step may allocate optimizer state and choose kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([batch], lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_run_never_waits_for_the_device_between_log_points(device, tmp_path, monkeypatch, accum_freq):
    def set_mode(mode: str) -> None:
        torch.cuda.set_sync_debug_mode(mode)
        modes.append(mode)

    modes: list[str] = []
    watch_steps(monkeypatch, begin=partial(set_mode, "error"), end=partial(set_mode, "default"))
    flags = f"--model {MODEL} --device cuda --precision amp_bf16 --dataset-type synthetic --train-num-samples 256"
    settings = f"--batch-size {32 // accum_freq} --accum-freq {accum_freq} --workers 1 --epochs 1 --lr 1e-3"
    unlogged = "--logs none --log-every-n-steps 1000 --telemetry-every-n-steps 0"
    try:
        # Packed texts, prefetch on a side stream, guard, clipping, patch dropout, verdicts read two steps later.
        main([*flags.split(), *settings.split(), *unlogged.split(), "--grad-clip-norm=1", "--force-patch-dropout=0.5"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == ["error", "default"]


def test_two_micro_batches_give_the_step_of_one_batch(device):
    results = []
    for parts in (1, 2):
        model, config = build_model(device)
        batch = build_batch(config, 16, device)
        step = build_step(model, device, precision="fp32")
        chunks = zip(*(tensor.chunk(parts) for tensor in batch), strict=True)
        loss = step([type(batch)(*chunk) for chunk in chunks], lr=1e-3).loss.item()
        results.append((loss, weights(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    # One AdamW step moves a weight by at most lr; the sign of a gradient that is nearly zero is not defined.
    apart = (results[1][1] - results[0][1]).abs()
    assert (apart > 1e-4).float().mean() < 1e-3


def test_a_ddp_step_of_one_process_over_nccl_equals_the_plain_step(device, tmp_path: Path):
    """DDP's buckets only: one process gathers no texts, and no machine with two GPUs runs these tests."""
    plain, config = build_model(device)
    batch = build_batch(config, 16, device)
    expected = build_step(plain, device, precision="fp32")([batch], lr=1e-3).loss.item()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=device)
    try:
        model, _ = build_model(device)
        wrapped = DistributedDataParallel(model, device_ids=[device.index])
        found = build_step(model, device, precision="fp32", trained=wrapped)([batch], lr=1e-3).loss.item()
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=1e-5)


def test_activation_checkpointing_lowers_the_peak(device):
    peaks = []
    for checkpointing in (False, True):
        model, config = build_model(device)
        engine = EngineConfig(device=str(device), precision="amp_bf16", grad_checkpointing=checkpointing)
        runtime = Runtime(rank=0, local_rank=0, world_size=1, device=device)
        trained = parallelize(model, config=engine, runtime=runtime)
        step = build_step(model, device, precision="amp_bf16", trained=trained)
        torch.cuda.reset_peak_memory_stats()
        step([build_batch(config, 1024, device)], lr=1e-3)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.8 * peaks[0]
