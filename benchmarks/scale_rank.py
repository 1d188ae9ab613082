"""One rank's real training step in a world of 1,024: how many collectives, how many bytes, how much memory.

    python -m benchmarks.scale_rank

    exchange   real tensors, real DDP: what a step sends, and whether it trains (the guard lets it pass)
    growth     the same in ever larger worlds: nothing may grow faster than the world

Model, loss, guard, clipping, optimizer and DDP are those of training; only the other ranks are missing (scale_world).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, table
from benchmarks.scale_world import fake_world
from models.factory import BuiltModel, create_model
from training.config import EngineConfig, LossConfig, OptimConfig, ResilienceConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import all_reduce_sum
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.losses.build import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience.guard import VITALS, StepGuard
from training.train_step import StepMetrics, TrainStep

NAME = "scale_rank"
WORLD = 1024
OPTIMIZER = OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, grad_clip_norm=5.0)
LOSSES = {
    "CLIP": LossConfig(local_loss=True, gather_with_grad=True),
    "SigLIP": LossConfig(siglip=True),
}


class Setting(NamedTuple):
    """What is run."""

    model: str
    batch_size: int
    loss: str = "CLIP"
    grad_checkpointing: bool = False
    micro_batches: int = 1
    shard_ranks: int | None = None
    """Ranks that share one copy (FSDP), 0 for all of them; None is DDP."""
    precision: str = "fp32"
    """Collectives are the same in all; processors without bf16 units are slow with it."""


def measure(*, small: bool = False) -> Result:
    """Both parts."""
    demo = Setting("demo-vit", 4)
    exchanges = [demo, *(demo._replace(loss=loss) for loss in list(LOSSES)[1:]), demo._replace(micro_batches=2)]
    # Sharded: the small model also shows what becomes of tensors with fewer rows than ranks.
    exchanges += [demo._replace(shard_ranks=ranks) for ranks in (8, 0)]
    worlds = (8, 16) if small else (256, 1024, 4096)
    return {
        "world": WORLD,
        "exchange": [exchange(setting, world=WORLD) for setting in exchanges],
        "growth": [exchange(demo, world=world) for world in worlds],
    }


def exchange(setting: Setting, *, world: int) -> dict[str, Any]:
    """Three steps with real memory; what the last one called. Rank 5: its labels are not the first columns.

    The gradient that a reduce-scatter returns here is only one rank's, so that the loss is of use before it is applied.
    """
    with fake_world(world, rank=5) as (runtime, log):
        torch.manual_seed(0)
        built = create_model(setting.model)
        step = build_step(built, setting, runtime=runtime)
        batches = [make_batch(built, setting.batch_size) for _ in range(setting.micro_batches)]
        before = [parameter.detach().clone() for parameter in built.model.parameters()]
        untrained = step(batches, lr=1e-3)
        step(batches, lr=1e-3)  # DDP orders its buckets anew after the first
        log.calls.clear()
        start = time.perf_counter()
        metrics = step(batches, lr=1e-3)
        took = time.perf_counter() - start
        trained = zip(built.model.parameters(), before, strict=True)
        return {
            **setting._asdict(),
            "kind_of_loss": setting.loss,
            "world": world,
            "parameters": sum(tensor.numel() for tensor in before),
            "collectives": log.summary(),
            "messages": [call._asdict() for call in log.calls] if setting.model == "demo-vit" else [],
            "feature_width": _width(built),
            "host_s": round(took, 4),
            "judged_bad": _vitals(metrics)["bad"],
            "loss": round(_vitals(untrained)["loss"], 4),
            "changed_parameters": sum(not torch.equal(now, then) for now, then in trained),
            "of_parameters": len(before),
        }


def build_step(built: BuiltModel, setting: Setting, *, runtime: Runtime, world: int | None = None) -> TrainStep:
    """As main does, on the CPU."""
    device = runtime.device
    config = EngineConfig(
        grad_checkpointing=setting.grad_checkpointing,
        precision=setting.precision,
        fsdp=setting.shard_ranks is not None,
        fsdp_shard_ranks=setting.shard_ranks or 0,
    )
    return TrainStep(
        model=parallelize(
            built.model,
            config=config,
            runtime=runtime,
            param_dtype=torch.bfloat16 if setting.precision == "amp_bf16" else None,
        ),
        loss=build_loss(LOSSES[setting.loss]),
        optimizer=build_optimizer(built.model, OPTIMIZER),
        precision=build_precision(config.precision, device),
        grad_clip_norm=OPTIMIZER.grad_clip_norm,
        guard=StepGuard(
            ResilienceConfig(),
            device=device,
            rank=runtime.rank,
            world_size=world or runtime.world_size,
            all_reduce_sum=all_reduce_sum,
        ),
    )


def make_batch(built: BuiltModel, batch_size: int) -> DeviceBatch:
    """Noise, and captions that end after their first token."""
    images = torch.randn(batch_size, 3, *built.preprocess.size)
    texts = torch.zeros(batch_size, built.config.text_cfg.context_length, dtype=torch.int64)
    texts[:, 0] = built.config.text_cfg.vocab_size - 1
    return DeviceBatch(images, texts)


def _width(built: BuiltModel) -> int:
    return built.config.embed_dim


def _vitals(metrics: StepMetrics) -> dict[str, float]:
    vitals = metrics.vitals
    assert isinstance(vitals, Tensor)
    return dict(zip(VITALS, vitals.tolist(), strict=True))


def tables(result: Result) -> Tables:
    """Markdown by name."""
    return {
        "rank_exchange": _exchange_table(result["exchange"]),
        "rank_growth": _growth_table(result["growth"]),
    }


def _exchange_table(rows: Sequence[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[object]:
        def of(kind: str) -> str:
            found = row["collectives"].get(kind)
            return "-" if found is None else f"{found['calls']}: {num_bytes(found['bytes'])}"

        changed = f"{row['changed_parameters']} of {row['of_parameters']}"
        name = f"{row['model']}, b = {row['batch_size']}" + (f" x {row['micro_batches']}" * (row["micro_batches"] > 1))
        kind_of_copy = {None: "DDP", 0: "FSDP"}.get(row["shard_ranks"], f"HSDP-{row['shard_ranks']}")
        kinds = [of(kind) for kind in ("all_reduce", "all_gather", "reduce_scatter")]
        return [name, kind_of_copy, row["kind_of_loss"], row["loss"], *kinds, changed]

    header = [
        "model",
        "parallel",
        "loss",
        "its mean over ranks, first step",
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "tensors that changed",
    ]
    return table(header, [cells(row) for row in rows])


def _growth_table(rows: Sequence[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        found = row["collectives"]
        calls = sum(entry["calls"] for entry in found.values())
        gathered = found["all_gather"]["bytes"] + found["reduce_scatter"]["bytes"]
        body.append([f"{row['world']:,}", calls, num_bytes(found["all_reduce"]["bytes"]), num_bytes(gathered)])
    return table(["ranks", "collectives per step", "bytes of all-reduces", "bytes of gathered texts, both ways"], body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
