"""How close a step comes to what the device can do: its rate of useful FLOPs, against matrix products measured on it.

    mfu_useful   FLOPs that the model needs x samples/s / ceiling
    equivalent   the same with the FLOPs of the padded model: how fast a padded step would have to be. No utilisation:
                 it may pass 1

The ceiling is that of short bursts of large products. A step draws power for longer, so the true ceiling is lower and
the utilisation higher than stated, never the other way round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.training_flops import TrainingFlops

CUDA_SIZES = (4096, 8192, 16384)
CPU_SIZES = (1024,)


class Ceiling(NamedTuple):
    """The fastest dense matrix product that was found."""

    tflops: float
    """Median of its repetitions."""
    size: int
    """Of its square matrices."""
    dtype: str


DATA_SHEET_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bf16 of the SXM modules, by NVIDIA's data sheets; by a part of the device's name."""


def data_sheet_mfu(flops: TrainingFlops, *, samples_per_s: float, gpu: str, dtype: torch.dtype) -> float | None:
    """Of the peak that the maker states; None for other devices and types, whose peak is not written down here."""
    peaks = [peak for name, peak in DATA_SHEET_TFLOPS.items() if name in gpu and "PCIe" not in gpu]
    return flops.useful * samples_per_s / (peaks[0] * 1e12) if peaks and dtype == torch.bfloat16 else None


class Utilisation(NamedTuple):
    """Of one arm, on one device."""

    mfu_useful: float
    equivalent: float


def measure_ceiling(
    device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] | None = None, repeats: int = 20
) -> Ceiling:
    """The device's rate at products of two square matrices, with the backend settings of this process."""
    sizes = sizes or (CUDA_SIZES if device.type == "cuda" else CPU_SIZES)
    rates = {size: _rate(size, device, dtype, repeats=repeats) for size in sizes}
    best = max(rates, key=rates.__getitem__)
    return Ceiling(rates[best], best, str(dtype).removeprefix("torch."))


def _rate(size: int, device: torch.device, dtype: torch.dtype, *, repeats: int) -> float:
    """TFLOP/s."""
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    for _ in range(5):
        torch.mm(left, right, out=out)
    if device.type == "cuda":
        times = _times_on_cuda(left, right, out, repeats=repeats)
    else:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e12


def _times_on_cuda(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        torch.mm(left, right, out=out)
        mark.record()
    torch.cuda.synchronize(out.device)  # host sync
    return [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:], strict=False)]


def utilisation(flops: TrainingFlops, *, samples_per_s: float, ceiling: Ceiling) -> Utilisation:
    """Of a device that trains on so many samples a second."""
    per_ceiling = samples_per_s / (ceiling.tflops * 1e12)
    return Utilisation(flops.useful * per_ceiling, flops.padded * per_ceiling)
