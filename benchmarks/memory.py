"""Peak memory of one arm: on CUDA by the allocator's own account, elsewhere in a process of its own."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Forget the high-water mark so far, where the system can (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_gib(device: torch.device) -> float:
    """High-water mark in GiB: allocated device memory on CUDA, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _status_kib("VmHWM") / 2**20


def resident_gib() -> float:
    """Resident memory now, in GiB."""
    return _status_kib("VmRSS") / 2**20


def held_gib(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """What an arm keeps on its device between steps: weights, gradients, moments."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == device.type
    }
    return sum(storages.values()) / 2**30


def _status_kib(field: str) -> float:
    if not STATUS.exists():
        # Outside Linux there is only the high-water mark; macOS counts it in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1024 if sys.platform == "darwin" else float(peak)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1])
