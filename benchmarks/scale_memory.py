"""Memory of a rank of 1,024 at the historical local batches: a real step with tensors that have shapes and no memory.

python -m benchmarks.scale_memory
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.scale_jobs import JOBS
from benchmarks.scale_rank import WORLD, Setting, build_step, make_batch
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, table
from benchmarks.scale_world import LiveMemory, fake_world
from models.factory import create_model
from training.distributed.runtime import Runtime

NAME = "scale_memory"


def measure(*, small: bool = False) -> Result:
    """The two jobs with --grad-checkpointing, as they ran."""
    settings = [Setting(job.model, job.batch_size, grad_checkpointing=True, precision="amp_bf16") for job in JOBS]
    if small:
        settings = [Setting("demo-vit", 8, precision="amp_bf16")]
    return {"world": WORLD, "full_size": [full_size(setting, world=WORLD) for setting in settings]}


def full_size(setting: Setting, *, world: int) -> dict[str, Any]:
    """A step at its real size without its memory.

    DDP's reducer is native code and cannot take tensors without memory: the plain model stands in for it. Its buckets
    hold the gradients themselves, so nothing is missing but their padding.
    """
    built = create_model(setting.model, device="meta")
    memory = LiveMemory()
    with fake_world(world, rank=5) as (runtime, log), FakeTensorMode(allow_non_fake_inputs=True), memory:
        _allocate(built.model, memory)
        single = Runtime(runtime.rank, 0, 1, runtime.device)  # no DDP; the loss and the guard ask the process group
        step = build_step(built, setting, runtime=single, world=world)
        weights = sum(parameter.nbytes for parameter in built.model.parameters())
        batch = make_batch(built, setting.batch_size)
        step([batch], lr=1e-3)  # from here on the optimizer has its state
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        between = memory.live
        memory.peak = memory.live
        log.calls.clear()
        step([batch], lr=1e-3)
        peak = memory.peak
    assert isinstance(batch.texts, Tensor)  # every caption as long as the context: the most there can be
    inputs = batch.images.nbytes + batch.texts.nbytes
    return {
        **setting._asdict(),
        "world": world,
        "global_batch": world * setting.batch_size,
        "parameters": sum(parameter.numel() for parameter in built.model.parameters()),
        "weights_bytes": weights,
        "optimizer_bytes": between - weights - inputs,
        "input_bytes": inputs,
        "step_peak_bytes": peak,
        "step_bytes": peak - between,
        "collectives": log.summary(),
    }


def _allocate(model: nn.Module, memory: LiveMemory) -> None:
    """Tensors of the current mode in place of the meta device's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                memory.add(empty)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def tables(result: Result) -> Tables:
    """Markdown by name."""
    return {"rank_memory": _memory_table(result["full_size"])}


def _memory_table(rows: Sequence[dict[str, Any]]) -> str:
    body = [
        [
            row["model"],
            row["batch_size"],
            f"{row['global_batch']:,}",
            "blocks" if row["grad_checkpointing"] else "none",
            *(num_bytes(row[name]) for name in ("weights_bytes", "optimizer_bytes", "input_bytes")),
            num_bytes(row["step_bytes"]),
            num_bytes(row["step_peak_bytes"]),
        ]
        for row in rows
    ]
    header = ["model", "b", "global batch", "checkpointing", "weights", "moments", "batch"]
    return table([*header, "activations, gradients and loss, at their peak", "all"], body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
