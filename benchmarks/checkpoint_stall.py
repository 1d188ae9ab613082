"""How long a checkpoint stops the training, and how long it takes to be on the disk.

    python -m benchmarks.checkpoint_stall --model ViT-B-32 --device cpu

    model + AdamW after one step -> rounds of: background save, synchronous save, torch.save, bare copy -> JSON

background   ``Saver.save_step``: training waits for the copy to host memory; the rest is written beside it
synchronous  ``Saver.save_now_and_wait``: the same checkpoint, training waits for all of it
torch_save   OpenCLIP's way: the state dicts into one .pt file, then fsync; no hash, not read back
copy         the state into memory that is there already: what the stall cannot go below

Each stall is given in wall time and in processor time of the training thread: on a machine that other programs share,
only the latter says what the stall costs. The first save of a run also allocates the staging memory; it
is reported apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_gib, reset_peak
from benchmarks.provenance import ROOT, describe_run
from models.factory import BuiltModel, create_model
from models.tokenizer import build_tokenizer
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.optimizer_state import pack_optimizer
from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.checkpoint.staging import Staging
from training.config import CheckpointConfig, DataConfig, ImageConfig, OptimConfig
from training.data.build import build_train_loader
from training.data.loader import TrainLoader
from training.distributed.runtime import Runtime
from training.optim.optimizer import build_optimizer
from training.state import TrainState

RESULTS = ROOT / "benchmarks" / "results"
logger = logging.getLogger("benchmarks.checkpoint_stall")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_stall", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="every arm once per round, in turn")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written (default: the temporary one)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME.json)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all arms and writes the result."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="checkpoint_stall-") as directory:
        result = measure(arguments, Path(directory))
    path = arguments.out or RESULTS / f"checkpoint_stall_{arguments.model}_{arguments.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    for name, numbers in result["arms"].items():
        logger.info("%-12s %s", name, numbers)
    return 0


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything that goes into the result file."""
    run = describe_run(torch.device(arguments.device))
    parts, runtime = build_parts(arguments.model, torch.device(arguments.device))
    size = sum(tensor.nbytes for tensor in state_tensors(parts).values()) / 1e9
    reset_peak(torch.device("cpu"))
    arms, saver = build_arms(parts, runtime, directory)
    first = arms["background"]()
    peak = peak_gib(torch.device("cpu"))
    rounds: dict[str, list[Mapping[str, float]]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, arm in arms.items():
            parts.state.step += 1
            rounds[name].append(arm())
    saver.finish()
    return {
        "benchmark": "checkpoint_stall",
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "directory")},
        "run": run,
        "state_gb": round(size, 4),
        "first_save": first,
        "host_memory_peak_gib": round(peak, 2),
        "arms": {name: summarise(measured, size=size) for name, measured in rounds.items()},
        "rounds": rounds,
    }


def build_parts(model: str, device: torch.device) -> tuple[RunParts, Runtime]:
    """A run after its first step, so that the optimizer has state."""
    built = create_model(model)
    built.model.to(device)
    optimizer = build_optimizer(built.model, OptimConfig(lr=1e-4, beta1=0.9, beta2=0.98, eps=1e-6))
    for parameter in built.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return RunParts(built.model, optimizer, None, build_loader(built), TrainState()), Runtime(0, 0, 1, device)


def build_loader(built: BuiltModel) -> TrainLoader:
    """A loader that nobody reads: its position is saved with the rest."""
    return build_train_loader(
        DataConfig(dataset_type="synthetic", train_num_samples=10_000, batch_size=32, workers=0),
        ImageConfig(),
        preprocess=built.preprocess,
        tokenizer=build_tokenizer(built.config, cache_dir=None),
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=0,
    )


def state_tensors(parts: RunParts) -> dict[str, Tensor]:
    """Weights and optimizer state."""
    return {**parts.model.state_dict(), **pack_optimizer(parts.optimizer, parts.model)[0]}


def build_arms(
    parts: RunParts, runtime: Runtime, directory: Path
) -> tuple[dict[str, Callable[[], Mapping[str, float]]], Saver]:
    """Each arm saves the state once and says how long the training stood (and, of the first two, how long it took)."""
    saver = Saver(
        CheckpointConfig(),
        checkpointer=Checkpointer(directory / "checkpoints"),
        parts=parts,
        runtime=runtime,
        run_config={},
        name="benchmark",
        epochs=1,
    )
    spare = Staging(runtime.device)

    def background() -> Mapping[str, float]:
        stall = _timed(lambda: saver.save_step(epoch=0))
        saver.finish()
        (report,) = saver.poll()
        return stall | {"write_s": report.write_s}

    def synchronous() -> Mapping[str, float]:
        stall = _timed(lambda: saver.save_now_and_wait(0, "benchmark"))
        saver.poll()
        return stall

    def torch_save() -> Mapping[str, float]:
        target = directory / "epoch.pt"
        stall = _timed(lambda: _torch_save(parts, target))
        target.unlink()
        return stall

    def copy() -> Mapping[str, float]:
        tensors = state_tensors(parts)
        return _timed(lambda: spare.copy(tensors))

    copy()  # its memory is there before it is measured
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return {"background": background, "synchronous": synchronous, "torch_save": torch_save, "copy": copy}, saver


def _timed(work: Callable[[], object]) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.thread_time()
    assert work()
    return {
        "stall_ms": (time.perf_counter() - wall) * 1e3,
        "stall_processor_ms": (time.thread_time() - processor) * 1e3,
    }


def _torch_save(parts: RunParts, target: Path) -> bool:
    with target.open("wb") as file:
        torch.save({"state_dict": parts.model.state_dict(), "optimizer": parts.optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    return True


def summarise(measured: Sequence[Mapping[str, float]], *, size: float) -> dict[str, float]:
    """Median and range of one arm; ``size`` in GB."""
    stalls = sorted(numbers["stall_ms"] for numbers in measured)
    median = statistics.median(stalls)
    numbers = {
        "stall_ms": round(median, 1),
        "stall_ms_min": round(stalls[0], 1),
        "stall_ms_max": round(stalls[-1], 1),
        "stall_ms_per_gb": round(median / size, 1),
        "stall_processor_ms": round(statistics.median(numbers["stall_processor_ms"] for numbers in measured), 1),
    }
    if "write_s" in measured[0]:
        writes = sorted(numbers["write_s"] for numbers in measured)
        numbers |= {
            "write_s": round(statistics.median(writes), 2),
            "write_s_min": round(writes[0], 2),
            "write_s_max": round(writes[-1], 2),
        }
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
