"""Samples/s, processor time and memory of our training loader and of OpenCLIP's, on the same shards, in alternation.

    python -m benchmarks.data_loader

    photos -> shards -> [ours | OpenCLIP's, each stopped while the other is measured] -> JSON

Loading alone: batches are taken and dropped. OpenCLIP's loader runs with the webdataset release that it pins.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.photo_shards import Shards, find_photos, make_shards
from benchmarks.provenance import ROOT, describe_run
from benchmarks.stopped_process import StoppedProcess

RESULTS = ROOT / "benchmarks" / "results"
PINNED_WEBDATASET = "webdataset==0.2.86"
"""The newest release that open_clip_torch 3.3.0 accepts (its ``training`` extra)."""
AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "jureca": (
        *("scale=(0.4,1.0)", "color_jitter=(0.32,0.32,0.32,0.08)", "color_jitter_prob=0.8"),
        *("gray_scale_prob=0.2", "use_timm=True"),
    ),
    "xxlarge": ("scale=(0.33,1.0)", "re_prob=0.35", "use_timm=True"),
}
STAGES = ("read", "decode", "tokenize")
logger = logging.getLogger("benchmarks.data_loader")


class Cell(NamedTuple):
    """One row of the table."""

    short_side: int
    augmentation: str
    workers: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_loader", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="short sides in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="with default augmentation")
    parser.add_argument("--augmentations", nargs="+", default=list(AUGMENTATIONS), choices=tuple(AUGMENTATIONS))
    parser.add_argument("--arms", default="both", choices=("both", "clipyard", "open_clip"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2048, help="different photos per size")
    parser.add_argument("--rounds", type=int, default=4, help="per arm, alternating")
    parser.add_argument("--seconds", type=float, default=2.0, help="per round, at least one batch of every worker")
    parser.add_argument("--quick", action="store_true", help="one size, one worker, one round")
    parser.add_argument("--photos", type=Path, help="a folder of photos (default: those of scikit-image, scikit-learn)")
    parser.add_argument("--directory", type=Path, default=Path.home() / ".cache" / "clipyard" / "benchmarks")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/data_loader_cpu.json)")
    parsed = parser.parse_args(argv)
    if parsed.quick:
        parsed.sizes, parsed.workers, parsed.augmentations, parsed.rounds = parsed.sizes[:1], [1], ["default"], 1
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, write its result, print the table; 1 if something it needs is missing."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        result = measure(arguments)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    path = arguments.out or RESULTS / "data_loader_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(table(result) + "\n")
    return 0


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Default augmentation with every number of workers, the others with the first of them."""
    return [
        Cell(size, augmentation, workers)
        for augmentation in arguments.augmentations
        for workers in (arguments.workers if augmentation == "default" else arguments.workers[:1])
        for size in arguments.sizes
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the result file."""
    run = describe_run(torch.device("cpu"))
    photos = find_photos(arguments.photos)
    shards = {
        size: make_shards(photos, arguments.directory, short_side=size, samples=arguments.samples)
        for size in arguments.sizes
    }
    names = ["clipyard", "open_clip"] if arguments.arms == "both" else [arguments.arms]
    paths = {name: environment_of(name, arguments.directory) for name in names}
    result: dict[str, Any] = {
        "benchmark": "data_loader",
        "settings": {name: getattr(arguments, name) for name in ("batch_size", "samples", "rounds", "seconds")},
        "augmentations": AUGMENTATIONS,
        "photo_kb": {size: made.image_kb for size, made in shards.items()},
        "run": run,
        "cells": [],
    }
    for cell in cells(arguments):
        measured = measure_cell(cell, shards[cell.short_side], paths, arguments)
        result["cells"].append(measured)
        logger.info("%s", " | ".join(row(measured)))
    return result


def environment_of(arm: str, directory: Path) -> list[str]:
    """Where an arm imports from before anything else; OpenCLIP's pinned webdataset is installed at the first run."""
    if arm == "clipyard":
        return []
    overlay = directory / PINNED_WEBDATASET
    if not (overlay / "webdataset").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(overlay)]
        subprocess.run([*command, PINNED_WEBDATASET], check=True)
    return [str(overlay)]


class LoaderProcess(StoppedProcess):
    """A process with one loader. It and its workers are stopped except while it is asked for batches."""

    def __init__(self, arm: str, flags: Sequence[str], *, paths: Sequence[str]) -> None:
        super().__init__("benchmarks.loader_arms", arm, paths=paths, environment={"OMP_NUM_THREADS": "1"})
        self.versions = self.ask({"flags": list(flags)})["versions"]

    def draw(self, *, discard: int, seconds: float, multiple: int) -> dict[str, Any]:
        """What ``loader_arms.draw`` measures."""
        return self.ask({"discard": discard, "seconds": seconds, "multiple": multiple})


def measure_cell(
    cell: Cell, shards: Shards, paths: Mapping[str, Sequence[str]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of both arms in the order A B B A A B ..., each after what was loaded before it has been dropped.

    Nothing is ready when a round ends, since taking batches is faster than loading: what is dropped is the batch that
    each worker was filling when it was stopped, and at first what it loads while caches are cold.
    """
    with ExitStack() as stack:
        arms = {
            name: stack.enter_context(LoaderProcess(name, flags_of(name, cell, shards, arguments), paths=where))
            for name, where in paths.items()
        }
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
        for number in range(arguments.rounds):
            for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
                discard = cell.workers * (2 if number == 0 else 1)
                rounds[name].append(arms[name].draw(discard=discard, seconds=arguments.seconds, multiple=cell.workers))
        measured: dict[str, Any] = {
            **cell._asdict(),
            "arms": {name: {**summarize(done), "versions": arms[name].versions} for name, done in rounds.items()},
        }
    if len(rounds) == 2:
        measured["ratio"] = ratio(rounds["clipyard"], rounds["open_clip"])
    return measured


def flags_of(arm: str, cell: Cell, shards: Shards, arguments: argparse.Namespace) -> list[str]:
    """The command line of a training run, the same for both programs."""
    augmentation = list(AUGMENTATIONS[cell.augmentation])
    if augmentation and arm == "clipyard":
        augmentation.append("openclip_keys=True")  # the same work: OpenCLIP leaves out some of these keys
    return [
        *("--train-data", shards.pattern, "--dataset-type", "webdataset", "--model", "ViT-B-32"),
        *("--train-num-samples", "100000000", "--batch-size", str(arguments.batch_size)),
        *("--workers", str(cell.workers)),
        *(("--aug-cfg", *augmentation) if augmentation else ()),
    ]


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One arm in one cell."""
    samples = sum(done["samples"] for done in rounds)
    rates = [done["samples"] / done["wall_s"] for done in rounds]
    counts = sum((Counter(done["counts"]) for done in rounds), Counter[str]())
    return {
        "samples_per_s": round(statistics.median(rates), 1),
        "samples_per_s_of_rounds": [round(rate, 1) for rate in rates],
        "cpu_s_per_1000": round(1000 * sum(done["cpu_s"] for done in rounds) / samples, 3),
        "kb_read_per_sample": round(sum(done["bytes_read"] for done in rounds) / samples / 1000, 1),
        "page_faults_per_sample": round(sum(done["minor_faults"] for done in rounds) / samples, 1),
        **{name: rounds[-1][name] for name in ("loader_memory", "all_memory")},
        "stage_us": {stage: round(counts[f"{stage}_us"] / samples, 1) for stage in STAGES if counts[f"{stage}_us"]},
    }


def ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times faster we are: median, least and greatest of the rounds; and by processor time."""

    def rate(done: Mapping[str, Any]) -> float:
        return float(done["samples"] / done["wall_s"])

    of_rounds = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    cost = [sum(done["cpu_s"] for done in arm) / sum(done["samples"] for done in arm) for arm in (theirs, ours)]
    return {
        "value": round(statistics.median(map(rate, ours)) / statistics.median(map(rate, theirs)), 2),
        "low": round(min(of_rounds), 2),
        "high": round(max(of_rounds), 2),
        "processor_time": round(cost[0] / cost[1], 2),
    }


def table(result: Mapping[str, Any]) -> str:
    """Markdown; of pairs ours comes first."""
    header = (
        *("short side, px", "augmentation", "workers", "samples/s: ours", "OpenCLIP", "ratio [of rounds]"),
        *("by CPU time", "CPU s per 1000", "PSS per worker, MB", "PSS with main process, MB", "kB read per sample"),
        "ours, us: " + " / ".join(STAGES),
    )
    rows = [list(header), ["---"] * len(header), *(row(cell) for cell in result["cells"])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(cell: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    arms = [cell["arms"].get(name) for name in ("clipyard", "open_clip")]

    def pair(value: Any) -> str:
        return " / ".join(value(arm) for arm in arms if arm)

    rates = [f"{arm['samples_per_s']:,.0f}" if arm else "-" for arm in arms]
    ratio = cell.get("ratio")
    stages = arms[0]["stage_us"] if arms[0] else {}
    return [
        *(str(cell["short_side"]), cell["augmentation"], str(cell["workers"]), *rates),
        f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "-",
        f"{ratio['processor_time']:.2f}" if ratio else "-",
        pair(lambda arm: f"{arm['cpu_s_per_1000']:.2f}"),
        pair(lambda arm: f"{arm['loader_memory']['pss_mb'] / cell['workers']:,.0f}"),
        pair(lambda arm: f"{arm['all_memory']['pss_mb']:,.0f}"),
        pair(lambda arm: f"{arm['kb_read_per_sample']:.0f}"),
        " / ".join(f"{stages[stage]:.0f}" for stage in STAGES if stage in stages) or "-",
    ]


if __name__ == "__main__":
    sys.exit(main())
