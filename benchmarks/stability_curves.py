"""Curves of a run made unstable on purpose: what becomes of it without the guard, with it, and with StableAdamW.

    python -m benchmarks.stability_curves --data demo-data --work logs/stability      (needs matplotlib: [benchmarks])

    the same seed, data, settings and faults -> one run of training.main per arm -> its own metrics and events -> PNG

The settings are hard on a small model: a high learning rate, hardly any warm-up, beta2 0.999. On top come faults at
fixed batches of the data, so that every arm meets the same ones: wrong captions, second moments scaled down to 1e-4 of
what they were (row 33 of the fault matrix), and one pixel that is not a number. They are made in the process of the
run, around its train step; what reacts to them is the code that every run has.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import training.assembly
import training.main
from benchmarks.provenance import ROOT, describe_run
from training.data.batch import Batch, DeviceBatch
from training.observability.events import read_events
from training.train_step import StepMetrics, TrainStep

RESULT = ROOT / "benchmarks" / "results" / "stability_curves_cpu.json"
PICTURE = ROOT / "docs" / "images" / "stability.png"
ARMS: dict[str, tuple[str, ...]] = {
    "guard off": ("--guard=off",),
    "guard on": (),
    "guard on, stableadamw": ("--opt=stableadamw",),
    "guard on, beta2 0.95": ("--beta2=0.95",),
}
COLORS = {"guard off": "#c0392b", "guard on": "#1f5fa8", "guard on, stableadamw": "#2e8b57"}
COLORS["guard on, beta2 0.95"] = "#b8860b"
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
}
WRONG_CAPTIONS, SECOND_MOMENT, NAN_PIXEL = "wrong captions", "second moment x 1e-4", "NaN pixel"
logger = logging.getLogger("benchmarks.stability_curves")


def planned_faults(steps: int) -> dict[int, str]:
    """Batch -> what goes wrong with it."""
    return {
        steps * 45 // 100: SECOND_MOMENT,
        steps * 65 // 100: WRONG_CAPTIONS,
        steps * 80 // 100: NAN_PIXEL,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every arm in a process of its own, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what clipyard make-demo-data wrote")
    parser.add_argument("--work", type=Path, required=True, help="directory of the runs; finished ones are kept")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--run-arm", choices=list(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run_arm:
        run_arm(arguments)
        return
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    run = describe_run(torch.device("cpu"))
    curves = {name: read_arm(arguments, name) for name in arguments.arms if finish_arm(arguments, name)}
    faults = planned_faults(arguments.steps)
    settings = {name: getattr(arguments, name) for name in ("steps", "batch_size", "lr", "seed")}
    result = {
        "benchmark": "stability_curves",
        "run": run,
        "settings": {**settings, "arms": ARMS, "model": MODEL},
        "faults": faults,
        "arms": {name: summarize(curve, faults) for name, curve in curves.items()},
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(curves, faults=faults, path=arguments.picture)
    sys.stdout.write(json.dumps(result["arms"], indent=1) + "\n")


def finish_arm(arguments: argparse.Namespace, name: str) -> bool:
    """Runs an arm, unless it has been run."""
    directory = run_directory(arguments, name)
    if not (directory / "done").exists():
        options = [
            f"--{key.replace('_', '-')}={value}"
            for key, value in vars(arguments).items()
            if key in ("data", "work", "steps", "batch_size", "lr", "seed")
        ]
        command = (sys.executable, "-m", "benchmarks.stability_curves", *options, f"--run-arm={name}")
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        logger.info("%s: exit code %d", name, code)
        (directory / "done").write_text(str(code))
    return True


def run_directory(arguments: argparse.Namespace, name: str) -> Path:
    """Of one arm."""
    return cast(Path, arguments.work.resolve()) / name.replace(", ", "_").replace(" ", "_")


# In the process of a run.


class NumberedBatch(DeviceBatch):
    """A batch that knows its place in the data."""

    number = -1


class FaultyStep(TrainStep):
    """The train step, on batches and second moments that are broken as planned."""

    faults: dict[int, str]

    def __call__(self, micro_batches: Sequence[DeviceBatch], *, lr: float) -> StepMetrics:
        (batch,) = micro_batches
        assert isinstance(batch, NumberedBatch)
        fault = self.faults.get(batch.number)
        if fault == WRONG_CAPTIONS:
            assert isinstance(batch.texts, Tensor)
            batch.texts.copy_(batch.texts.roll(1, dims=0))
        elif fault == NAN_PIXEL:
            batch.images[0, 0, 0, 0] = math.nan
        elif fault == SECOND_MOMENT:
            for state in self.optimizer.state.values():
                state["exp_avg_sq"].mul_(1e-4)
        return super().__call__(micro_batches, lr=lr)


def run_arm(arguments: argparse.Namespace) -> None:
    """One run of training.main, whose train step is a ``FaultyStep``."""
    FaultyStep.faults = planned_faults(arguments.steps)
    plain_loading = training.assembly.build_device_loading

    def numbered_loading(*args: Any, **kwargs: Any) -> Callable[[Iterator[Batch]], Iterator[DeviceBatch]]:
        load = plain_loading(*args, **kwargs)

        def load_numbered(batches: Iterator[Batch]) -> Iterator[DeviceBatch]:
            for number, batch in enumerate(load(batches)):
                numbered = NumberedBatch(*batch)
                numbered.number = number
                yield numbered

        return load_numbered

    namespace: Any = training.main
    namespace.TrainStep, namespace.build_device_loading = FaultyStep, numbered_loading
    directory = run_directory(arguments, arguments.run_arm)
    directory.mkdir(parents=True, exist_ok=True)
    model = directory.parent / "stability-vit.json"
    model.write_text(json.dumps(MODEL))
    training.main.main(
        [
            *("--model", str(model), "--device", "cpu", "--precision", "fp32", "--seed", str(arguments.seed)),
            *("--dataset-type", "webdataset", "--train-data", f"{arguments.data.resolve()}/train/*.tar"),
            *("--dataset-resampled", "--train-num-samples", str(arguments.steps * arguments.batch_size)),
            *("--batch-size", str(arguments.batch_size), "--workers", "1", "--epochs", "1"),
            *("--lr", str(arguments.lr), "--beta2", "0.999", "--warmup", "20", "--wd", "0.1"),
            *("--telemetry-every-n-steps", "1", "--log-metric-every-n-steps", "1", "--log-every-n-steps", "100"),
            *("--save-every-n-steps", "40", "--keep-checkpoints", "8", "--guard-skip-steps", "40"),
            *("--guard-damp-steps", "100"),
            *("--logs", str(directory.parent), "--name", directory.name, "--resume", "latest"),
            *ARMS[arguments.run_arm],
        ]
    )


# What the runs wrote.


class Curve(NamedTuple):
    """One arm: values by step."""

    loss: dict[int, float]
    grad_norm: dict[int, float]
    patch_rms: dict[int, float]
    events: list[dict[str, Any]]
    exit_code: int


def read_arm(arguments: argparse.Namespace, name: str) -> Curve:
    """From the files of the run."""
    directory = run_directory(arguments, name)
    files = (directory / "metrics.jsonl", directory / "telemetry.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def curve(key: str) -> dict[int, float]:
        return {line["step"]: float(line[key]) for line in lines if key in line and line[key] is not None}

    return Curve(
        loss=curve("train/loss"),
        grad_norm=curve("train/grad_norm"),
        patch_rms=curve("telemetry/update_rms_patch_embedding"),
        events=read_events(directory / "events.jsonl"),
        exit_code=int((directory / "done").read_text()),
    )


def summarize(curve: Curve, faults: dict[int, str]) -> dict[str, object]:
    """What the picture shows, in numbers."""
    finite = {step: value for step, value in curve.loss.items() if math.isfinite(value)}
    moment = next(step for step, fault in faults.items() if fault == SECOND_MOMENT)
    before, after = ([finite[step] for step in finite if 0 < step - start <= 100] for start in (moment - 101, moment))
    last = [value for step, value in curve.loss.items() if step > max(curve.loss) - 50]
    kinds = sorted({event["event"] for event in curve.events})
    return {
        "exit_code": curve.exit_code,
        "median_loss_in_the_100_steps_before_the_second_moment": _median(before),
        "median_loss_in_the_100_steps_after_it": _median(after),
        "median_loss_of_the_last_50_steps": _median(last),
        "last_step_with_a_finite_loss": max(finite),
        "steps_with_a_loss_that_is_not_finite": len(curve.loss) - len(finite),
        "events": {kind: [event["step"] for event in curve.events if event["event"] == kind] for kind in kinds},
    }


def _median(values: Sequence[float]) -> float | str:
    """Of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    return round(statistics.median(finite), 4) if finite else "not finite"


def draw(curves: dict[str, Curve], *, faults: dict[int, str], path: Path) -> None:
    """Loss, gradient norm, RMS_t of the patch embedding, and what was done, over the same steps.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import_module("matplotlib").use("Agg")
        pyplot = import_module("matplotlib.pyplot")
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'clipyard[benchmarks]'") from None
    rows = (("loss", "loss"), ("grad_norm", "gradient norm"), ("patch_rms", "RMS$_t$, patch embedding"))
    figure, axes = pyplot.subplots(
        4, 1, figsize=(11, 11), sharex=True, height_ratios=(3, 2, 2, 0.4 + 0.3 * len(curves)), layout="constrained"
    )
    for axis, (field, label) in zip(axes, rows, strict=False):
        for name, curve in curves.items():
            values: dict[int, float] = getattr(curve, field)
            steps = range(max(values) + 1)
            raw = [values.get(step, math.nan) for step in steps]  # NaN leaves a gap
            axis.plot(steps, raw, color=COLORS[name], linewidth=0.6, alpha=0.3)
            axis.plot(steps, _smooth(raw), color=COLORS[name], linewidth=1.3, label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
    for name, curve in curves.items():
        if lost := [step for step, value in curve.loss.items() if not math.isfinite(value)]:
            last = max((step for step in curve.loss if step < lost[0]), default=0)
            if len(lost) > 1:  # a step that the guard skips is not the end
                axes[0].plot(last, curve.loss[last], "x", color=COLORS[name], markersize=11, markeredgewidth=3)
                axes[0].annotate("NaN from here on", (last, curve.loss[last]), (8, 8), textcoords="offset points")
    axes[0].legend(loc="upper left", fontsize=9, framealpha=0.95)
    for axis in axes[1:3]:
        axis.set_yscale("log")
    axes[2].axhline(2.3, color="black", linewidth=0.8, linestyle=":")
    axes[2].text(0, 2.45, "2.3", fontsize=8)
    for axis in axes:
        for step in faults:
            axis.axvline(step, color="black", linewidth=0.7, alpha=0.5, linestyle="--")
    top = axes[0].get_ylim()[1]
    for step, fault in faults.items():
        axes[0].annotate(fault, (step, top), (3, -10), textcoords="offset points", fontsize=8)
    _draw_events(axes[3], curves)
    axes[3].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _smooth(values: Sequence[float], *, window: int = 9) -> list[float]:
    """Median over the last few: a single step does not move it, a change of level does at once."""
    smoothed = []
    for place, value in enumerate(values):
        recent = [other for other in values[max(0, place + 1 - window) : place + 1] if math.isfinite(other)]
        smoothed.append(statistics.median(recent) if recent and math.isfinite(value) else math.nan)
    return smoothed


def _draw_events(axis: Any, curves: dict[str, Curve]) -> None:
    """One line per arm: what the guard did."""
    markers = {"skipped": ("|", 60), "damp": ("v", 28), "undamp": ("^", 28), "rewound": ("s", 40), "stopped": ("X", 60)}
    shown = set()
    for row, (name, curve) in enumerate(curves.items()):
        for kind, (marker, size) in markers.items():
            steps = [event["step"] for event in curve.events if event["event"] == kind]
            label = kind if steps and kind not in shown else None
            shown |= {kind} if steps else set()
            axis.scatter(steps, [row] * len(steps), marker=marker, s=size, color=COLORS[name], label=label)
    axis.set_yticks(range(len(curves)), list(curves), fontsize=8)
    axis.set_ylim(len(curves) - 0.4, -0.6)
    if shown:
        axis.legend(loc="upper left", fontsize=8, ncols=len(shown))


if __name__ == "__main__":
    main()
