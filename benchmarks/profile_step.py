"""Where the time of one train step goes, by kind of operation: OpenCLIP's step, ours, and ours with everything off.

    python -m benchmarks.profile_step --model ViT-B-32 --batch-size 32 --device cpu
    python -m benchmarks.profile_step --model ViT-B-32-256 --batch-size 896 --device cuda --torchcompile

    torch.profiler -> every operation with its own time -> one category each (step_categories.py) -> JSON, table

On CUDA a category's time is that of the kernels which its operations started; on a CPU it is the operations' own. What
is left of the step's wall clock is Python between operations, or on CUDA a device without work.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.batches import HostBatch, make_batches
from benchmarks.open_clip_checkout import describe_open_clip, open_clip_label, use_open_clip_checkout
from benchmarks.provenance import ROOT, describe_run, device_label, model_name
from benchmarks.scale_report import fill, table
from benchmarks.step_categories import CATEGORIES, LOSS_MARK, STEP_MARK, Operation, categorize, read_operations
from benchmarks.train_step_arms import (
    ArmSettings,
    ClipyardArm,
    OpenClipArm,
    StepArm,
    Tuning,
)
from models.factory import create_model
from models.transformer import Transformer
from training.assembly import seed_all, set_device_defaults
from training.losses import Loss

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "profile.md"
BEFORE, AFTER, OFF = "open_clip", "clipyard", "clipyard_off"
LABELS = {BEFORE: "OpenCLIP", AFTER: "ours", OFF: "ours, everything off"}
logger = logging.getLogger("benchmarks.profile_step")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", default=[BEFORE, OFF, AFTER], choices=(BEFORE, OFF, AFTER))
    parser.add_argument("--steps", type=int, default=5, help="profiled together")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--torchcompile", action="store_true", help="compile our blocks")
    parser.add_argument("--tune-open-clip", action="store_true", help="OpenCLIP compiled and with fused AdamW")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--trace", type=Path, help="also write a trace for chrome://tracing: the arm's name is added")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME.json)")
    parser.add_argument("--write-page", action="store_true", help="only put all results into docs/benchmarks")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and write the result, or put the results that there are into the page."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    if arguments.write_page:
        arguments.page.write_text(fill(arguments.page.read_text(), {"profile": tables_of_results(RESULTS)}))
        return 0
    use_open_clip_checkout(arguments.open_clip_path, may_restart=argv is None)
    result = measure(arguments)
    path = arguments.out or RESULTS / f"{result_name(arguments)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table_of(result))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the result file."""
    device = torch.device(arguments.device)
    run = describe_run(device)
    set_device_defaults(device)
    settings = ArmSettings(model=arguments.model, precision=arguments.precision, device=device)
    built = create_model(arguments.model, device="meta")
    batches = make_batches(
        arguments.steps + arguments.warmup_steps,
        batch_size=arguments.batch_size,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    arms = {}
    for name in arguments.arms:
        seed_all(0)
        arm = build_arm(name, settings, arguments)
        arms[name] = profile_arm(arm, batches, warmup=arguments.warmup_steps, trace=trace_path(arguments.trace, name))
        logger.info("%s: %.1f ms per step", name, arms[name]["wall_ms"])
    left_out = ("out", "page", "write_page", "trace")
    kept = {name: value for name, value in vars(arguments).items() if name not in left_out}
    kept["model"] = model_name(arguments.model)
    return {
        "benchmark": "profile_step",
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in kept.items()},
        "run": run,
        "arms": arms,
    }


def build_arm(name: str, settings: ArmSettings, arguments: argparse.Namespace) -> StepArm:
    """One of the three, with its loss marked for the profile."""
    if name == BEFORE:
        theirs = OpenClipArm(settings, tuning=Tuning(compiled=arguments.tune_open_clip))
        theirs._loss = Marked(theirs._loss)
        return theirs
    if name == AFTER:
        ours = ClipyardArm(settings, flags=["--torchcompile"] if arguments.torchcompile else [])
    else:
        ours = ClipyardArm(settings, flags=["--text-packing=off"])
        for module in ours.model.modules():
            if isinstance(module, Transformer):
                module.whole_last_block = True
    ours._step.loss = cast(Loss, Marked(ours._step.loss))
    return ours


class Marked:
    """A loss with a name around it that the profile shows."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self._loss: Any = loss

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with record_function(LOSS_MARK):
            return self._loss(*arguments, **options)

    def begin(self, text_features: Tensor) -> Any:
        with record_function(LOSS_MARK):
            return self._loss.begin(text_features)


def trace_path(trace: Path | None, name: str) -> Path | None:
    """One file for each arm."""
    return None if trace is None else trace.with_name(f"{trace.stem}_{name}{trace.suffix or '.json'}")


def profile_arm(arm: StepArm, batches: Sequence[HostBatch], *, warmup: int, trace: Path | None) -> dict[str, Any]:
    """Some steps of an arm on their batches; those before them only warm it up."""
    prepared = arm.prepare(batches)
    device = next(arm.model.parameters()).device
    for batch in prepared[:warmup]:
        arm.step(batch)
    _wait_for(device)
    steps = len(prepared) - warmup
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        for batch in prepared[warmup:]:
            with record_function(STEP_MARK):
                arm.step(batch)
        _wait_for(device)
        wall_ms = 1000 * (time.perf_counter() - start) / steps
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events: Any = profiler.events()
    return summarize(read_operations(events, on_device=device.type == "cuda"), steps=steps, wall_ms=wall_ms)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # host sync


def summarize(operations: Iterable[Operation], *, steps: int, wall_ms: float) -> dict[str, Any]:
    """Time and number of operations by category, per step."""
    by_category: dict[str, list[Operation]] = {category: [] for category in CATEGORIES}
    by_name: dict[str, list[Operation]] = {}
    for operation in operations:
        by_category[categorize(operation)].append(operation)
        by_name.setdefault(operation.name, []).append(operation)
    time_ms = {category: _ms(found) / steps for category, found in by_category.items()}
    number = {category: sum(one.kernels for one in found) / steps for category, found in by_category.items()}
    total_ms = sum(time_ms.values())
    names_ms = {name: _ms(found) / steps for name, found in by_name.items()}
    return {
        "wall_ms": round(wall_ms, 3),
        "operations_ms": round(total_ms, 3),
        "operations": round(sum(number.values()), 1),
        "categories": {
            category: {
                "ms": round(time_ms[category], 3),
                "share": round(time_ms[category] / total_ms, 4) if total_ms else 0.0,
                "operations": round(number[category], 1),
            }
            for category in CATEGORIES
        },
        "slowest_ms": {name: round(names_ms[name], 3) for name in sorted(names_ms, key=names_ms.__getitem__)[:-13:-1]},
        "other": sorted({operation.name for operation in by_category["other"]}),
    }


def _ms(operations: Iterable[Operation]) -> float:
    return sum(operation.time_us for operation in operations) / 1000


def result_name(arguments: argparse.Namespace) -> str:
    """File name of a result."""
    device = device_label(torch.device(arguments.device))
    parts = ["profile_step", model_name(arguments.model), device, arguments.precision, f"b{arguments.batch_size}"]
    parts += [flag.replace("_", "-") for flag in ("torchcompile", "tune_open_clip") if getattr(arguments, flag)]
    return "_".join([*parts, f"openclip-{open_clip_label({'open_clip': describe_open_clip()})}"])


def table_of(result: Mapping[str, Any]) -> str:
    """One measurement: a column of ms (share) for each arm."""
    settings, run, arms = result["settings"], result["run"], result["arms"]
    hardware = run["hardware"]
    on_device = settings["device"].startswith("cuda")
    caption = (
        f"{settings['model']}, batch {settings['batch_size']}, {settings['precision']}"
        f"{', our blocks compiled' if settings['torchcompile'] else ''}"
        f"{', OpenCLIP tuned' if settings['tune_open_clip'] else ''}; {hardware.get('gpu', hardware['cpu'])}, "
        f"{hardware['threads']} threads, torch {run['versions']['torch']}, commit {(run['commit'] or '?')[:9]}"
        f"{'+' if run['uncommitted_changes'] else ''}: ms per step (share), number of "
        f"{'kernels' if on_device else 'operations'}"
    )
    rows = [
        [category, *(_cell(arm["categories"][category]) for arm in arms.values())]
        for category in CATEGORIES
        if any(arm["categories"][category]["operations"] for arm in arms.values())
    ]
    rows.append(["all of them", *(f"{arm['operations_ms']:.1f}, {arm['operations']:,.0f}" for arm in arms.values())])
    left = "device without work" if on_device else "between operations (Python)"
    rows.append([left, *(f"{max(0.0, arm['wall_ms'] - arm['operations_ms']):.1f}" for arm in arms.values())])
    rows.append(["wall clock, with the profiler's own cost", *(f"{arm['wall_ms']:.1f}" for arm in arms.values())])
    return f"{caption}.\n\n" + table(["", *(LABELS[name] for name in arms)], rows)


def _cell(part: Mapping[str, float]) -> str:
    return f"{part['ms']:.1f} ({part['share']:.0%}), {part['operations']:,.0f}" if part["operations"] else "-"


def tables_of_results(directory: Path) -> str:
    """All measurements that were kept, one table each."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("profile_step_*.json"))]
    return "\n".join(table_of(result) for result in results) if results else "No measurement is kept yet.\n"


if __name__ == "__main__":
    sys.exit(main())
