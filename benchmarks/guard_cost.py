"""What the guard, telemetry and replica checksums add to a step, at their default settings.

    python -m benchmarks.guard_cost --model ViT-B-32 --batch-size 16 --blocks 12

    one model, one optimizer -> two train steps on them, without and with the guard -> blocks A B B A ...
                             -> what the watching does by itself, timed alone

Both arms share everything but the guard, so neither is better placed in memory. The guard's arm also does what a run
does with its verdicts: brings them to the host two steps later, and asks the escalation what follows. A difference of
a per mille cannot be seen between steps of seconds on a machine that others use: the parts are therefore timed by
themselves as well, telemetry and checksums spread over their intervals, and their sum is given as a share of a step:
by the wall clock, and on the CPU by processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import make_batches
from benchmarks.provenance import ROOT, describe_run
from benchmarks.timing import Arm, Times, alternate, speed_ratio, spread, time_block
from models.clip import Clip
from models.factory import create_model
from training.config import LossConfig, OptimConfig, ResilienceConfig
from training.data.batch import DeviceBatch, normalize
from training.losses import build_loss
from training.observability.sinks import JsonLinesSink, MetricSink, TensorBoardSink
from training.observability.telemetry import Telemetry
from training.optim.optimizer import build_optimizer
from training.precision import Precision, build_precision
from training.resilience.delayed import DelayedVitals
from training.resilience.escalation import Escalation
from training.resilience.guard import StepGuard
from training.resilience.replicas import replica_checksum
from training.train_step import StepMetrics, TrainStep

RESULT = ROOT / "benchmarks" / "results" / "guard_cost_cpu.json"
CONFIG = ResilienceConfig()
LR = 1e-4
logger = logging.getLogger("benchmarks.guard_cost")


class Setup(NamedTuple):
    """What both arms share."""

    model: Clip
    optimizer: torch.optim.Optimizer
    precision: Precision
    batches: list[DeviceBatch]
    device: torch.device

    def step(self, guard: StepGuard | None) -> TrainStep:
        """A train step on the shared model."""
        return TrainStep(
            model=self.model,
            loss=build_loss(LossConfig()),
            optimizer=self.optimizer,
            precision=self.precision,
            guard=guard,
        )


class Watched:
    """A guarded step, and what a run does with its verdict."""

    def __init__(self, setup: Setup) -> None:
        self.guard = build_guard(setup.device)
        self._step = setup.step(self.guard)
        self._vitals = DelayedVitals()
        self._escalation = Escalation(CONFIG)
        self._number = 0

    def __call__(self, batch: DeviceBatch) -> StepMetrics:
        metrics = self._step([batch], lr=LR)
        assert metrics.vitals is not None
        self.read(metrics.vitals)
        return metrics

    def read(self, vitals: Tensor) -> None:
        """The host's part."""
        self._vitals.push(self._number, vitals)
        self._number += 1
        for step, read in self._vitals.ready():
            self._escalation.observe(step, read)


def build_guard(device: torch.device) -> StepGuard:
    """As a run of one process builds it."""
    return StepGuard(CONFIG, device=device, rank=0, world_size=1, all_reduce_sum=Tensor.clone)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the result, prints a summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=12, help="timed blocks per arm")
    parser.add_argument("--block-steps", type=int, default=1)
    parser.add_argument("--warmup-steps", type=int, default=3, help="untimed steps per arm")
    parser.add_argument("--repeats", type=int, default=10, help="of telemetry, and of checksums")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    run = describe_run(torch.device(arguments.device))
    result = {"benchmark": "guard_cost", "run": run, **measure(arguments)}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps({key: result[key] for key in ("share", "ratio")}, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Everything but where it was measured."""
    setup = build(arguments)
    plain, watched = setup.step(None), Watched(setup)
    arms = {
        "plain": Arm(partial(pick, setup.batches), lambda batch: plain([batch], lr=LR)),
        "guard": Arm(partial(pick, setup.batches), watched),
    }
    for arm in arms.values():
        time_block(arm, first_step=0, steps=arguments.warmup_steps, device=setup.device)
    times = alternate(
        arms, blocks=arguments.blocks, block_steps=arguments.block_steps, rewarm_steps=0, device=setup.device
    )
    alone = measure_alone(setup, watched, repeats=arguments.repeats)
    shares = {"wall": share(alone["wall"], step_ms=min(spread(times[name].wall).q25_ms for name in arms))}
    if all(times["plain"].work):
        shares["processor_time"] = share(alone["work"], step_ms=min(spread(times[name].work).q25_ms for name in arms))
    return {
        "settings": {
            **{name: value for name, value in vars(arguments).items() if name != "out"},
            "telemetry_every_n_steps": CONFIG.telemetry_every_n_steps,
            "checksum_every_n_steps": CONFIG.checksum_every_n_steps,
        },
        "step_ms": {name: spread(times[name].wall)._asdict() for name in arms},
        "once_ms": alone,
        "share": shares,
        "ratio": ratios(times),
    }


def share(once_ms: dict[str, float], *, step_ms: float) -> dict[str, float]:
    """What each part costs per step at its default interval, and all of it as a share of a quiet step."""
    per_step = {
        "guard_ms": once_ms["judge"] + once_ms["read"],
        "telemetry_ms": (once_ms["telemetry"] + once_ms["sinks"]) / CONFIG.telemetry_every_n_steps,
        "checksum_ms": once_ms["checksum"] / CONFIG.checksum_every_n_steps,
    }
    total = sum(per_step.values())
    numbers = {**per_step, "sum_ms": total, "step_ms": step_ms, "sum_pct": 100 * total / step_ms}
    return {name: round(value, 4) for name, value in numbers.items()}


def build(arguments: argparse.Namespace) -> Setup:
    """Model, optimizer and batches, as a run has them."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    built = create_model(arguments.model, device=arguments.device)
    host = make_batches(
        4,
        batch_size=arguments.batch_size,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    mean, std = built.preprocess.mean, built.preprocess.std
    batches = [
        DeviceBatch(
            normalize(batch.images.to(device), mean=mean, std=std, dtype=torch.float32), batch.texts.to(device)
        )
        for batch in host
    ]
    model = built.model.train()
    optimizer = build_optimizer(model, OptimConfig(lr=LR, beta1=0.9, beta2=0.98, eps=1e-6))
    return Setup(model, optimizer, build_precision(arguments.precision, device), batches, device)


def pick(batches: list[DeviceBatch], number: int) -> DeviceBatch:
    """Batches in turn."""
    return batches[number % len(batches)]


def ratios(times: dict[str, Times]) -> dict[str, object]:
    """The plain step's time over the guarded one's: 1 is no cost. By wall clock, and on the CPU by processor time."""
    plain, guard = times["plain"], times["guard"]
    found: dict[str, object] = {"wall": speed_ratio(guard.wall, plain.wall)._asdict()}
    if all(plain.work):
        found["processor_time"] = speed_ratio(guard.work, plain.work)._asdict()
    return found


def measure_alone(setup: Setup, watched: Watched, *, repeats: int) -> dict[str, dict[str, float]]:
    """Median ms of each part by itself, after a step, by both clocks."""
    batch = setup.batches[0]
    telemetry = Telemetry(
        setup.model, setup.optimizer, every=CONFIG.telemetry_every_n_steps, autocast=setup.precision.autocast
    )
    metrics = watched(batch)
    vitals = metrics.vitals
    assert vitals is not None
    assert metrics.grad_norm is not None
    guard, loss, norm, rows = build_guard(setup.device), metrics.loss, metrics.grad_norm, batch.images[:, 0, 0]
    measured = telemetry.measure(batch)
    with tempfile.TemporaryDirectory() as directory:
        sinks: list[MetricSink] = [
            JsonLinesSink(Path(directory) / "metrics.jsonl", first_step=0),
            TensorBoardSink(Path(directory), first_step=0),
        ]
        parts: dict[str, tuple[Callable[[], object], int]] = {
            "judge": (lambda: guard.judge(loss, norm, features=rows.sum()), 20 * repeats),
            "read": (lambda: watched.read(vitals), 20 * repeats),
            "telemetry": (lambda: telemetry.measure(batch), repeats),
            "sinks": (partial(write, sinks, measured), repeats),
            "checksum": (lambda: replica_checksum(setup.model, setup.optimizer), repeats),
        }
        found = {name: median_ms(part, times, device=setup.device) for name, (part, times) in parts.items()}
        for sink in sinks:
            sink.close()
    wall, work = ({name: round(pair[clock], 4) for name, pair in found.items()} for clock in (0, 1))
    return {"wall": wall, "work": work}


def write(sinks: Sequence[MetricSink], measured: dict[str, float]) -> None:
    """What rank 0 does with the numbers."""
    for sink in sinks:
        sink.write(0, measured)


def median_ms(part: Callable[[], object], times: int, *, device: torch.device) -> tuple[float, float]:
    """Median wall and processor time of a call, after one that does not count; on CUDA until the device is done."""
    wall, work = [], []
    for _ in range(times + 1):
        start, start_work = time.perf_counter(), time.process_time()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall.append((time.perf_counter() - start) * 1000)
        work.append((time.process_time() - start_work) * 1000)
    logger.info("%d calls: %.3f ms in the median", times, statistics.median(wall[1:]))
    return statistics.median(wall[1:]), statistics.median(work[1:])


if __name__ == "__main__":
    main()
