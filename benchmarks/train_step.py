"""Samples/s and peak memory of our train step and of OpenCLIP's, in one run on the same weights and batches.

    python -m benchmarks.train_step --model ViT-B-32 --batch-size 32 --precision fp32 --device cpu

    same weights -> same batches -> parity gate -> warm-up -> blocks A B B A ... -> memory, one process per arm -> JSON

Compute only: images lie on the device as uint8 and are normalised before the clock starts, for both arms alike
(OpenCLIP normalises in its loader, so its step does not pay for that either). See docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.batches import HostBatch, describe_captions, make_batches
from benchmarks.memory import peak_gib, reset_peak, resident_gib
from benchmarks.parity import Parity, check_parity
from benchmarks.provenance import ROOT, describe_run
from benchmarks.timing import Arm, Times, alternate, speed_ratio, spread, time_block
from benchmarks.train_step_arms import ARMS, ArmSettings, ClipyardArm, OpenClipArm, StepArm, use_open_clip_checkout
from models.factory import create_model
from training.data.batch import DeviceBatch, normalize

RESULTS = ROOT / "benchmarks" / "results"
logger = logging.getLogger("benchmarks.train_step")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16", "bf16", "pure_bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", default="both", choices=("both", *ARMS))
    parser.add_argument("--blocks", type=int, default=10, help="timed blocks per arm")
    parser.add_argument("--block-steps", type=int, help="timed steps per block (20 on CUDA, 1 elsewhere)")
    parser.add_argument("--warmup-steps", type=int, help="untimed steps per arm at the start (30 on CUDA, 2 elsewhere)")
    parser.add_argument("--rewarm-steps", type=int, help="untimed steps per block (2 on CUDA, 0 elsewhere)")
    parser.add_argument("--parity-steps", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="different batches, used in turn")
    parser.add_argument("--full-length", action="store_true", help="every caption as long as the context")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--torchcompile", action="store_true", help="compile our blocks")
    parser.add_argument("--tune-open-clip", action="store_true", help="OpenCLIP compiled and with fused AdamW")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME.json)")
    parser.add_argument("--memory-of", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    on_cuda = torch.device(parsed.device).type == "cuda"
    for name, cuda, elsewhere in (("block_steps", 20, 1), ("warmup_steps", 30, 2), ("rewarm_steps", 2, 0)):
        if getattr(parsed, name) is None:
            setattr(parsed, name, cuda if on_cuda else elsewhere)
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole benchmark, or, in a child process, measure the memory of one arm."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    if arguments.open_clip_path:
        use_open_clip_checkout(arguments.open_clip_path)
    torch.manual_seed(0)
    # As OpenCLIP's trainer sets them, for both arms.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if arguments.memory_of:
        sys.stdout.write(json.dumps(measure_memory(arguments)) + "\n")
        return 0
    result = measure(arguments)
    path = arguments.out or RESULTS / f"{result_name(arguments)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    logger.info("%s", summary(result))
    return 0


def settings_of(arguments: argparse.Namespace) -> ArmSettings:
    """The part of the command line that builds an arm."""
    return ArmSettings(
        model=arguments.model,
        precision=arguments.precision,
        device=torch.device(arguments.device),
        grad_checkpointing=arguments.grad_checkpointing,
        torchcompile=arguments.torchcompile,
        tune_open_clip=arguments.tune_open_clip,
    )


class Feed:
    """Batches on the device, handed out in turn, normalised when asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        built = create_model(arguments.model, device="meta")
        self._preprocess = built.preprocess
        self.host = make_batches(
            arguments.batches,
            batch_size=arguments.batch_size,
            image_size=built.preprocess.size,
            context_length=built.config.text_cfg.context_length,
            full_length=arguments.full_length,
            seed=0,
        )
        device = torch.device(arguments.device)
        self._resident = [HostBatch(*(tensor.to(device) for tensor in batch)) for batch in self.host]

    def __call__(self, step: int, *, dtype: torch.dtype = torch.float32) -> DeviceBatch:
        batch = self._resident[step % len(self._resident)]
        images = normalize(batch.images, mean=self._preprocess.mean, std=self._preprocess.std, dtype=dtype)
        return DeviceBatch(images, batch.texts)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Parity, speed and memory: everything that goes into the result file."""
    run = describe_run(torch.device(arguments.device))
    names = list(ARMS) if arguments.arms == "both" else [arguments.arms]
    feed = Feed(arguments)
    arms = {name: ARMS[name](settings_of(arguments)) for name in names}
    result: dict[str, object] = {
        "benchmark": "train_step",
        "settings": settings_as_json(arguments),
        "caption_tokens": describe_captions(feed.host),
        "run": run,
    }
    if len(arms) == 2:
        parity = gate(arms, feed, arguments)
        logger.info("parity: loss apart %.1e, gradients %s", parity.loss_difference, parity.gradient_difference)
        result["parity"] = parity._asdict()
    times = measure_times(arms, feed, arguments)
    result["arms"] = {name: describe_times(times[name], batch_size=arguments.batch_size) for name in names}
    if len(arms) == 2:
        ours, theirs = times[ClipyardArm.name], times[OpenClipArm.name]
        result["ratio"] = speed_ratio(ours.wall, theirs.wall)._asdict()
        if torch.device(arguments.device).type != "cuda":
            result["processor_time_ratio"] = speed_ratio(ours.work, theirs.work)._asdict()
    result["step_times_ms"] = {name: [[round(ms, 3) for ms in block] for block in times[name].wall] for name in names}
    del arms  # their memory must be free before other processes measure theirs
    result["memory"] = {name: memory_of_child(name, arguments) for name in names}
    return result


def gate(arms: Mapping[str, StepArm], feed: Feed, arguments: argparse.Namespace) -> Parity:
    """Give both arms the same weights, and let no timing count unless they compute the same."""
    ours, theirs = arms[ClipyardArm.name], arms[OpenClipArm.name]
    theirs.model.load_state_dict(ours.model.state_dict(), strict=True)
    steps = [feed(number, dtype=ours.input_dtype) for number in range(arguments.parity_steps)]
    return check_parity(ours, theirs, steps, precision=arguments.precision)


def measure_times(arms: Mapping[str, StepArm], feed: Feed, arguments: argparse.Namespace) -> dict[str, Times]:
    """Warm both arms up, then time them in alternating blocks."""
    device = torch.device(arguments.device)
    timed = {name: Arm(partial(feed, dtype=arm.input_dtype), arm.step) for name, arm in arms.items()}
    for arm in timed.values():
        time_block(arm, first_step=0, steps=max(1, arguments.warmup_steps), device=device)
    return alternate(
        timed,
        blocks=arguments.blocks,
        block_steps=arguments.block_steps,
        rewarm_steps=arguments.rewarm_steps,
        device=device,
    )


def describe_times(times: Times, *, batch_size: int) -> dict[str, float]:
    """Step time and samples/s of one arm."""
    wall = spread(times.wall)
    return {**wall._asdict(), "samples_per_s": batch_size * 1000 / wall.median_ms}


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak over three steps of one arm, alone in this process, in GiB."""
    device = torch.device(arguments.device)
    feed = Feed(arguments)
    arm = ARMS[arguments.memory_of](settings_of(arguments))
    before = resident_gib()
    reset_peak(device)
    for number in range(3):
        arm.step(feed(number, dtype=arm.input_dtype))
    return {"peak_gib": peak_gib(device), "resident_before_steps_gib": before}


def memory_of_child(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The same command line in a process of its own, which measures only the memory of one arm."""
    options = [
        f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')}={value}"
        for key, value in vars(arguments).items()
        if value not in (None, False) and key not in ("out", "memory_of")
    ]
    command = (sys.executable, "-m", "benchmarks.train_step", *options, "--batches", "1", "--memory-of", name)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return cast("dict[str, float]", json.loads(done.stdout.splitlines()[-1]))


def settings_as_json(arguments: argparse.Namespace) -> dict[str, object]:
    """The command line with defaults filled in; of a checkout only its folder's name."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "memory_of")}
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def result_name(arguments: argparse.Namespace) -> str:
    """File name of a result: what distinguishes one measurement from the next."""
    device = torch.device(arguments.device).type
    parts = ["train_step", arguments.model, device, arguments.precision, f"b{arguments.batch_size}"]
    flags = ("full_length", "grad_checkpointing", "torchcompile", "tune_open_clip")
    parts += [flag.replace("_", "-") for flag in flags if getattr(arguments, flag)]
    return "_".join(part.replace("/", "-") for part in parts)


def summary(result: Mapping[str, Any]) -> str:
    """The result in a few lines."""
    lines = [
        f"{name:<9} {times['samples_per_s']:9.1f} samples/s  {times['median_ms']:9.1f} ms "
        f"[{times['q25_ms']:.1f}, {times['q75_ms']:.1f}]  peak {result['memory'][name]['peak_gib']:.2f} GiB"
        for name, times in result["arms"].items()
    ]
    if ratio := result.get("ratio"):
        lines.append(f"clipyard is {ratio['value']:.3f} times as fast [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    if work := result.get("processor_time_ratio"):
        lines.append(f"by processor time {work['value']:.3f} [{work['low']:.3f}, {work['high']:.3f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
