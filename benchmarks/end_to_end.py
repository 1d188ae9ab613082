"""Whole training steps with their loaders in the loop: ours and OpenCLIP's in turn, on the same shards.

    python -m benchmarks.end_to_end                                           (CPU, a tiny model: about a minute)
    python -m benchmarks.end_to_end --device cuda --model ViT-B-32-256 --batch-size 896 --precision amp_bf16

    photos -> shards -> [our run | OpenCLIP's, each stopped with its workers while the other is measured] -> JSON
    gate on a given batch -> warm-up until what was loaded ahead is used up -> blocks A B B A A B ... -> memory

Each program is a process of its own: it has the memory it has alone, and its workers can be stopped with it. What a
step waits for its batch is part of the step here; ``benchmarks/train_step.py`` measures it without.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.batches import make_batches
from benchmarks.data_loader import PINNED_WEBDATASET
from benchmarks.end_to_end_arms import ARMS, Preparation
from benchmarks.open_clip_checkout import describe_open_clip, find_package, open_clip_label, use_open_clip_checkout
from benchmarks.parity import LOSS_TOLERANCE, LOW_PRECISION_LOSS_TOLERANCE
from benchmarks.photo_shards import LINKED_SHARDS, find_photos, make_shards
from benchmarks.provenance import ROOT, describe_run, device_label, model_name, slug
from benchmarks.scale_report import fill, table
from benchmarks.stopped_process import StoppedProcess
from benchmarks.timing import speed_ratio, spread
from models.factory import create_model

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "end_to_end.md"
GATE_SAMPLES = 32
logger = logging.getLogger("benchmarks.end_to_end")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark; defaults that depend on the device are filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="ViT-B-32-256 on CUDA, demo-vit elsewhere")
    parser.add_argument("--batch-size", type=int, help="896 on CUDA, 32 elsewhere")
    parser.add_argument("--workers", type=int, help="of each program (one per core on CUDA, 1 elsewhere)")
    parser.add_argument("--precision", help="amp_bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--blocks", type=int, default=6, help="timed blocks per arm")
    parser.add_argument("--block-steps", type=int, default=8, help="raised to a multiple of the workers")
    parser.add_argument("--warmup-steps", type=int, default=10, help="at least as many as can be loaded ahead")
    parser.add_argument("--rewarm-steps", type=int, help="untimed steps per block (2 on CUDA, 0 elsewhere)")
    parser.add_argument("--budget-s", type=float, default=90.0, help="no further pair of blocks begins after this")
    parser.add_argument("--gate-steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--short-side", type=int, default=256, help="of the photos, in pixels")
    parser.add_argument("--samples", type=int, default=1024, help="different photos")
    parser.add_argument("--photos", type=Path, help="a folder of photos (default: those of scikit-image, scikit-learn)")
    parser.add_argument("--directory", type=Path, default=Path.home() / ".cache" / "clipyard" / "benchmarks")
    parser.add_argument("--decode", help="of our loader; gpu decodes on the device")
    parser.add_argument("--torchcompile", action="store_true", help="compile our blocks")
    parser.add_argument("--our-flags", default="", help="further flags of our run, in one word")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--tune-open-clip", action="store_true", help="OpenCLIP compiled and with fused AdamW")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME.json)")
    parser.add_argument("--write-page", action="store_true", help="only put all results into docs/benchmarks")
    parser.add_argument("--page", type=Path, default=PAGE)
    parsed = parser.parse_args(argv)
    on_cuda = torch.device(parsed.device).type == "cuda"
    cores = min(os.cpu_count() or 1, LINKED_SHARDS)
    defaults: dict[str, tuple[object, object]] = {
        "model": ("ViT-B-32-256", "demo-vit"),
        "batch_size": (896, 32),
        "workers": (cores, 1),
        "precision": ("amp_bf16", "fp32"),
        "rewarm_steps": (2, 0),
    }
    for name, (cuda, elsewhere) in defaults.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, cuda if on_cuda else elsewhere)
    if parsed.workers < 1:
        parser.error(f"--workers {parsed.workers}: OpenCLIP's loader runs in the trainer then; give 1 or more")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its result, or put the results that there are into the page."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    if arguments.write_page:
        arguments.page.write_text(fill(arguments.page.read_text(), {"end_to_end": table_of_results(RESULTS)}))
        return 0
    try:
        use_open_clip_checkout(arguments.open_clip_path, may_restart=argv is None)
        result = measure(arguments)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    path = arguments.out or RESULTS / f"{result_name(arguments)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(HEADER, rows([result])))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the result file."""
    start = time.monotonic()
    run = describe_run(torch.device(arguments.device))
    photos = find_photos(arguments.photos)
    shards = make_shards(photos, arguments.directory, short_side=arguments.short_side, samples=arguments.samples)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                StoppedProcess("benchmarks.end_to_end_arms", name, paths=paths_of(name, arguments))
            )
            for name in ARMS
        }
        preparation = prepare(arguments, shards.pattern, Path(temporary))
        answers = {name: process.ask({"prepare": preparation._asdict()}) for name, process in processes.items()}
        gate = check_gate(
            *(answers[name]["gate_losses"] for name in ("clipyard", "open_clip")), precision=arguments.precision
        )
        logger.info("gate: losses apart %.1e", gate["difference"])
        blocks = alternate(processes, arguments, end=start + arguments.budget_s)
        memory = {name: process.ask({"memory": True}) for name, process in processes.items()}
    arms = {
        name: {**summarize(blocks[name], batch_size=arguments.batch_size), **memory[name], **answers[name]}
        for name in processes
    }
    ours, theirs = ([[mean] for mean in block_means(blocks[name])] for name in ("clipyard", "open_clip"))
    return {
        "benchmark": "end_to_end",
        "settings": settings_as_json(arguments),
        "photo_kb": shards.image_kb,
        "run": run,
        "gate": gate,
        "arms": arms,
        "ratio": speed_ratio(ours, theirs)._asdict(),
        "processor_time_ratio": round(arms["open_clip"]["cpu_s_per_1000"] / arms["clipyard"]["cpu_s_per_1000"], 3),
        "blocks": blocks,
    }


def paths_of(arm: str, arguments: argparse.Namespace) -> list[str]:
    """OpenCLIP's checkout, if one is named; and the webdataset that OpenCLIP pins, if ``data_loader`` installed it."""
    overlay = arguments.directory / PINNED_WEBDATASET
    checkout = [str(find_package(arguments.open_clip_path))] if arguments.open_clip_path else []
    return [*checkout, *([str(overlay)] if arm == "open_clip" and overlay.is_dir() else [])]


def prepare(arguments: argparse.Namespace, pattern: str, directory: Path) -> Preparation:
    """What both arms are made from; the batch of the gate is written."""
    built = create_model(arguments.model, device="meta")
    (batch,) = make_batches(
        1,
        batch_size=GATE_SAMPLES,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    torch.save(tuple(batch), directory / "gate.pt")
    flags = [
        *("--train-data", pattern, "--dataset-type", "webdataset", "--train-num-samples", "100000000"),
        *("--batch-size", str(arguments.batch_size), "--workers", str(arguments.workers)),
    ]
    own = [*(["--decode", arguments.decode] if arguments.decode else []), *shlex.split(arguments.our_flags)]
    return Preparation(
        flags=flags,
        model=arguments.model,
        precision=arguments.precision,
        device=arguments.device,
        weights=str(directory / "weights.pt"),
        gate=str(directory / "gate.pt"),
        gate_steps=arguments.gate_steps,
        lr=arguments.lr,
        own_flags=[*own, *(["--torchcompile"] if arguments.torchcompile else [])],
        grad_checkpointing=arguments.grad_checkpointing,
        tune_open_clip=arguments.tune_open_clip,
        open_clip_path=str(arguments.open_clip_path) if arguments.open_clip_path else None,
    )


def check_gate(ours: Sequence[float], theirs: Sequence[float], *, precision: str) -> dict[str, Any]:
    """How far the losses of both arms are apart on the batch that both were given.

    Raises:
        RuntimeError: too far for the same training; a ratio of their speeds would mean nothing.
    """
    apart = max(abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True))
    tolerance = LOSS_TOLERANCE.get(precision, LOW_PRECISION_LOSS_TOLERANCE)
    if not apart <= tolerance:
        raise RuntimeError(
            f"losses on the same batch differ by {apart:.2e} (tolerance {tolerance:.0e}): {ours} and {theirs}; no "
            "timing counts"
        )
    return {"difference": apart, "tolerance": tolerance, "ours": list(ours), "theirs": list(theirs)}


def alternate(
    processes: Mapping[str, StoppedProcess], arguments: argparse.Namespace, *, end: float
) -> dict[str, list[dict[str, Any]]]:
    """Warm-up, then blocks in the order A B B A A B ...; two pairs at least, however late it is."""
    steps = -(-arguments.block_steps // arguments.workers) * arguments.workers  # of every worker as many batches
    warmup = max(arguments.warmup_steps, 2 * arguments.workers + 2)  # OpenCLIP's workers load two batches ahead, each
    for process in processes.values():
        process.ask({"steps": 1, "rewarm": warmup - 1})
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    for number in range(arguments.blocks):
        if number >= 2 and time.monotonic() > end:
            logger.warning("%d of %d blocks: the %.0f s are over", number, arguments.blocks, arguments.budget_s)
            break
        for name in list(processes) if number % 2 == 0 else list(processes)[::-1]:
            block = processes[name].ask({"steps": steps, "rewarm": arguments.rewarm_steps})
            blocks[name].append(block)
            mean = statistics.fmean(block["step_ms"])
            logger.info("block %d of %d, %s: %.1f ms", number + 1, arguments.blocks, name, mean)
    return blocks


def block_means(blocks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean step time of each block in ms. Not the median: batches of several workers come in bursts."""
    return [statistics.fmean(block["step_ms"]) for block in blocks]


def summarize(blocks: Sequence[Mapping[str, Any]], *, batch_size: int) -> dict[str, Any]:
    """Samples/s of one arm over its blocks, and where its time went."""
    means = spread([[mean] for mean in block_means(blocks)])
    steps = sum(len(block["step_ms"]) for block in blocks)
    total_ms = sum(sum(block["step_ms"]) for block in blocks)
    return {
        "samples_per_s": round(1000 * batch_size / means.median_ms, 1),
        "samples_per_s_q25": round(1000 * batch_size / means.q75_ms, 1),
        "samples_per_s_q75": round(1000 * batch_size / means.q25_ms, 1),
        "step_ms": round(means.median_ms, 3),
        "data_wait_share": round(sum(sum(block["wait_ms"]) for block in blocks) / total_ms, 4),
        "host_wait_share": round(sum(block["host_wait_ms"] for block in blocks) / total_ms, 4),
        "cpu_s_per_1000": round(1000 * sum(block["cpu_s"] for block in blocks) / (steps * batch_size), 3),
        "blocks": len(blocks),
        "steps": steps,
    }


def settings_as_json(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command line with defaults filled in; of paths nothing but a checkout's name."""
    left_out = ("out", "page", "write_page", "directory", "photos")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    settings["model"] = model_name(arguments.model)
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def result_name(arguments: argparse.Namespace) -> str:
    """File name of a result: what distinguishes one measurement from the next."""
    device = device_label(torch.device(arguments.device))
    parts = ["end_to_end", model_name(arguments.model), device, arguments.precision, f"b{arguments.batch_size}"]
    parts += [f"w{arguments.workers}", *([f"decode-{arguments.decode}"] if arguments.decode else [])]
    flags = ("torchcompile", "grad_checkpointing", "tune_open_clip")
    parts += [flag.replace("_", "-") for flag in flags if getattr(arguments, flag)]
    parts += [slug(word) for word in shlex.split(arguments.our_flags)]
    parts.append(f"openclip-{open_clip_label({'open_clip': describe_open_clip()})}")
    return "_".join(parts)


HEADER = (
    *("model, batch, precision", "workers", "flags", "samples/s: ours [quartiles]", "OpenCLIP [quartiles]"),
    *("ratio [95 %]", "waiting for data: ours / OpenCLIP", "CPU s per 1000 samples", "peak memory, GiB"),
    *("machine", "OpenCLIP", "commit"),
)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of the table; of pairs ours comes first."""
    return [_row(result) for result in results]


def _row(result: Mapping[str, Any]) -> list[str]:
    settings, run, ratio = result["settings"], result["run"], result["ratio"]
    arms = [result["arms"][name] for name in ("clipyard", "open_clip")]
    rates = [
        f"{arm['samples_per_s']:,.0f} [{arm['samples_per_s_q25']:,.0f}, {arm['samples_per_s_q75']:,.0f}]"
        for arm in arms
    ]
    flags = [f"--decode {settings['decode']}"] if settings["decode"] else []
    flags += ["--torchcompile"] if settings["torchcompile"] else []
    flags += [settings["our_flags"]] if settings["our_flags"] else []
    flags += ["OpenCLIP tuned"] if settings["tune_open_clip"] else []
    hardware = run["hardware"]
    return [
        f"{settings['model']}, {settings['batch_size']}, {settings['precision']}",
        str(settings["workers"]),
        ", ".join(flags) or "defaults",
        *rates,
        f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]",
        " / ".join(f"{arm['data_wait_share']:.0%}" for arm in arms),
        " / ".join(f"{arm['cpu_s_per_1000']:.2f}" for arm in arms),
        " / ".join(f"{arm['peak_gib']:.2f}" for arm in arms),
        f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cores']} cores",
        open_clip_label(run),
        f"{(run['commit'] or '?')[:9]}{'+' if run['uncommitted_changes'] else ''}",
    ]


def table_of_results(directory: Path) -> str:
    """All measurements that were kept, in one table."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("end_to_end_*.json"))]
    return table(HEADER, rows(results)) if results else "No measurement is kept yet.\n"


if __name__ == "__main__":
    sys.exit(main())
