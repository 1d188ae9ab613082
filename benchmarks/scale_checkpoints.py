"""What a checkpoint of a run on 1,024 ranks holds: lane state, files, bytes, and the seconds that each of it takes.

python -m benchmarks.scale_checkpoints

lanes   the position of 49,152 lanes over 231,350 shards: gathered, merged, written, read, dealt anew
real    rank 0's own code in a world of 1,024 (scale_world): capture, then write and verify its files on this disk
plans   every model's weights and moments, spread over writers by the code that spreads them
"""

from __future__ import annotations

import json
import math
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from benchmarks.scale_jobs import MODELS, XXLARGE
from benchmarks.scale_rank import OPTIMIZER
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, seconds, table
from benchmarks.scale_world import fake_world
from models.config import load_model_config
from models.factory import build_model, create_model
from models.tokenizer import Tokenizer
from training.checkpoint.capture import capture
from training.checkpoint.checkpointer import Checkpointer, Share, new_token
from training.checkpoint.manifest import describe
from training.checkpoint.parts import choose_writers, spread
from training.checkpoint.run_state import RunParts
from training.checkpoint.staging import Staging
from training.config import DataConfig, ImageConfig, ResilienceConfig
from training.data.build import build_train_loader
from training.data.lanes import LanePosition, owned_lanes
from training.data.loader import TrainLoader
from training.data.position import RankPosition, merge_ranks, read_position
from training.distributed.collectives import all_reduce_sum
from training.optim.optimizer import build_optimizer
from training.resilience.guard import StepGuard
from training.state import TrainState

NAME = "scale_checkpoints"
WORLD = 1024
DISK_GB_S = 1.0
"""Of one writer or reader on a parallel file system, hashing included. Assumed; the processor's part is measured."""
COPY_GB_S = 20.0
"""Device to page-locked host memory. Assumed: PCIe 4."""
_SHARDED = (8, WORLD)
"""Ranks of one copy: HSDP within a node, and FSDP over all."""
_FILES_BESIDE = 4
"""rng, data, train.json, MANIFEST.json."""
T = TypeVar("T")


def measure(*, small: bool = False) -> Result:
    """All three parts."""
    world = 64 if small else WORLD
    models = ("demo-vit",) if small else MODELS
    return {
        "world": world,
        "assumed": {"disk_gb_s": DISK_GB_S, "copy_gb_s": COPY_GB_S},
        "lanes": measure_lanes(world, shards=5000 if small else XXLARGE.num_shards),
        "real": measure_capture("demo-vit" if small else "ViT-B-32-256", world),
        "plans": [plan(model, world) for model in models],
    }


def build_loader(world: int, *, shards: int = XXLARGE.num_shards, rank: int = 0) -> TrainLoader:
    """The historical run's loader; nothing is read."""
    config = DataConfig(
        train_data=f"pipe:aws s3 cp s3://laion5b/laion2B-data/{{000000..{shards - 1:06d}}}.tar -",
        train_num_samples=XXLARGE.samples_per_epoch,
        dataset_type="webdataset",
        dataset_resampled=True,
        batch_size=XXLARGE.batch_size,
        workers=XXLARGE.workers,
    )
    model = load_model_config("ViT-B-32")
    return build_train_loader(
        config,
        ImageConfig(),
        preprocess=create_model("demo-vit", device="meta").preprocess,
        tokenizer=Tokenizer(model),
        rank=rank,
        world_size=world,
        accum_freq=1,
        seed=0,
    )


def measure_lanes(world: int, *, shards: int) -> dict[str, Any]:
    """With lanes in the middle of their work, where numbers have as many digits as they ever do."""
    loader = build_loader(world, shards=shards)
    deal = loader.deal
    ranks = [
        RankPosition([_busy(lane) for lane in owned_lanes(deal.num_lanes, rank=rank, world_size=world)], cursor=rank)
        for rank in range(world)
    ]
    merged, merge_s = _timed(lambda: merge_ranks(ranks, identity=loader.identity, deal=deal, emitted=10**9))
    tensors, facts = merged.tensors(), json.dumps(merged.facts())
    saved, read_s = _timed(lambda: read_position(tensors, json.loads(facts)))
    again, again_s = _timed(
        lambda: saved.deal.again(list(saved.lanes), num_lanes=deal.num_lanes // 2, block=deal.block)
    )
    return {
        "shards": shards,
        "lanes": deal.num_lanes,
        "lanes_per_rank": deal.num_lanes / world,
        "message_of_a_rank_bytes": len(pickle.dumps(ranks[0])),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "json_bytes": len(facts),
        "pieces_bytes_after_dealing_anew": again.pieces.nbytes,
        "merge_s": merge_s,
        "read_s": read_s,
        "deal_anew_s": again_s,
    }


def measure_capture(model: str, world: int) -> dict[str, Any]:
    """Rank 0's whole save, but for the other writers' files."""
    with fake_world(world) as (runtime, log), tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        built = create_model(model)
        optimizer = build_optimizer(built.model, OPTIMIZER)
        for parameter in built.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parts = RunParts(
            built.model,
            optimizer,
            None,
            build_loader(world),
            TrainState(),
            guard=StepGuard(
                ResilienceConfig(), device=runtime.device, rank=0, world_size=world, all_reduce_sum=all_reduce_sum
            ),
        )
        staging = Staging(runtime.device)
        log.calls.clear()
        _, first_s = _timed(lambda: capture(parts, runtime=runtime, epoch=0, config={}, staging=staging))
        messages = log.summary()
        captured, stall_s = _timed(lambda: capture(parts, runtime=runtime, epoch=0, config={}, staging=staging))
        share = captured.share
        checkpointer = Checkpointer(directory)
        place = checkpointer.new_staging(0, token=new_token())
        _, write_s = _timed(lambda: checkpointer.write_share(place, share, writer=0))
        files = {name: (place / name).stat().st_size for name in _files(share)}
        _, verify_s = _timed(lambda: [describe(place / name) for name in files])
    return {
        "model": model,
        # Not captured.writers: to each rank of a fake world all others are the same one.
        "writers": choose_writers(12 * sum(map(torch.numel, built.model.parameters())), world_size=world),
        "share_bytes": share.nbytes,
        "first_capture_s": first_s,
        "capture_s": stall_s,
        "messages": messages,
        "write_s": write_s,
        "write_mb_s": share.nbytes / write_s / 1e6,
        "verify_s": verify_s,
        "verify_mb_s": share.nbytes / verify_s / 1e6,
        "files": files,
    }


def plan(model: str, world: int) -> dict[str, Any]:
    """Files and bytes, by the code that chooses writers and spreads tensors over them."""
    config = load_model_config(model)
    weights = {name: tensor.nbytes for name, tensor in build_model(config, device="meta").state_dict().items()}
    moments = {f"{name}//{key}": size for name, size in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    total = sum(weights.values()) + sum(moments.values())
    plans = {}
    for ranks in (1, *(ranks for ranks in _SHARDED if ranks <= world)):
        copies = len(choose_writers(total // ranks, world_size=world // ranks))
        shares = [
            sum(parts) for parts in zip(*(_shares(sizes, ranks, copies) for sizes in (weights, moments)), strict=True)
        ]
        writers = ranks * copies
        plans["DDP" if ranks == 1 else "FSDP" if ranks == world else f"HSDP-{ranks}"] = {
            "writers": writers,
            "files": 2 * writers + _FILES_BESIDE,
            "largest_share": max(shares),
            "least_of_largest": min(shares) / max(shares),
            **times(total, max(shares)),
        }
    return {"model": model, "bytes": total, "plans": plans}


def _shares(sizes: Mapping[str, int], ranks: int, copies: int) -> list[int]:
    """Bytes of each of a shard's writers; sharded tensors are as good as evenly cut."""
    rows = {name: math.ceil(size / ranks) for name, size in sizes.items()}
    return [sum(rows[name] for name in names) for names in spread(rows, copies)]


def times(total: int, largest_share: int) -> dict[str, float]:
    """Seconds at the assumed rates."""
    return {
        "stall_s": largest_share / COPY_GB_S / 1e9,
        "write_s": largest_share / DISK_GB_S / 1e9,
        "read_back_s": total / DISK_GB_S / 1e9,
        "load_s": total / DISK_GB_S / 1e9,
    }


def _busy(lane: int) -> LanePosition:
    return LanePosition(turn=1234, block_start=85 * (lane % 90), taken=lane % 85, offset=40_000 * 85 * (lane % 90))


def _files(share: Share) -> list[str]:
    return [*share.tensors, *share.texts]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """(result, processor seconds): what a quiet machine's clock would show; others compute on this one."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def tables(result: Result) -> Tables:
    """Markdown by name."""
    return {
        "lane_state": _lanes_table(result["lanes"], result["world"]),
        "capture": _capture_table(result["real"], result["world"]),
        "checkpoint_plans": _plans_table(result),
    }


def _lanes_table(lanes: dict[str, Any], world: int) -> str:
    rows = [
        ["lanes, by default", f"{lanes['lanes']:,} ({lanes['lanes_per_rank']:.0f} a rank)"],
        ["what a rank sends to rank 0", num_bytes(lanes["message_of_a_rank_bytes"])],
        [f"what rank 0 receives from {world:,}", num_bytes(world * lanes["message_of_a_rank_bytes"])],
        ["in the checkpoint: data.safetensors", num_bytes(lanes["tensor_bytes"])],
        ["in the checkpoint: train.json", num_bytes(lanes["json_bytes"])],
        ["after dealing anew, besides", num_bytes(lanes["pieces_bytes_after_dealing_anew"])],
        ["merging the ranks' parts, on rank 0", seconds(lanes["merge_s"])],
        ["reading it, on every rank", seconds(lanes["read_s"])],
        ["dealing anew, on every rank", seconds(lanes["deal_anew_s"])],
    ]
    return table(["lane state", "measured, processor time"], rows)


def _capture_table(real: dict[str, Any], world: int) -> str:
    gathered = real["messages"]["all_gather"]
    rows = [
        ["writers", f"{len(real['writers'])}: ranks {', '.join(map(str, real['writers']))}"],
        ["rank 0's share", num_bytes(real["share_bytes"])],
        ["training waits: first save, later ones", f"{seconds(real['first_capture_s'])}, {seconds(real['capture_s'])}"],
        ["gathered from all ranks", f"{gathered['calls']} collectives, {num_bytes(gathered['bytes'])}"],
        ["written and hashed, in the background", f"{seconds(real['write_s'])} ({real['write_mb_s']:.0f} MB/s)"],
        ["read back and hashed", f"{seconds(real['verify_s'])} ({real['verify_mb_s']:.0f} MB/s)"],
        ["random state of all ranks", num_bytes(real["files"]["rng.safetensors"])],
        ["train.json", num_bytes(real["files"]["train.json"])],
    ]
    return table([f"rank 0 of {world:,}, {real['model']}", "measured, processor time"], rows)


def _plans_table(result: Result) -> str:
    body = []
    for row in result["plans"]:
        for name, entry in row["plans"].items():
            body.append(
                [
                    row["model"],
                    num_bytes(row["bytes"]),
                    name,
                    f"{entry['writers']:,}",
                    f"{entry['files']:,}",
                    num_bytes(entry["largest_share"]),
                    *(seconds(entry[key]) for key in ("stall_s", "write_s", "read_back_s", "load_s")),
                ]
            )
    header = ["model", "weights and moments", "ranks", "writers", "files", "largest share"]
    return table([*header, "copied", "written", "read back, by rank 0", "loaded"], body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
