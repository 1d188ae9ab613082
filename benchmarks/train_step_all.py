"""All models of the train-step benchmark with one command, one process per model, within a time that is known before.

    python -m benchmarks.train_step_all                  on a GPU: 8 minutes, the most telling model first
    python -m benchmarks.train_step_all --dry-run        the plan and its times; measures nothing
    python -m benchmarks.train_step_all --arms all       every rival for every model: about an hour
    python -m benchmarks.train_step_all --suite cpu      two narrow models: ratios for a log, in about a minute

Every model has seconds of its own; what it leaves over, the next may use. A process that takes longer is ended, what it
has written by then stays, and the others are measured nevertheless. The command fails in the end if any of them did;
on a CPU an end by time is no failure.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.open_clip_checkout import use_open_clip_checkout
from benchmarks.provenance import ROOT, describe_run
from benchmarks.train_step import RESULTS, parse_arguments, result_name
from benchmarks.train_step_arms import RIVALS
from benchmarks.train_step_report import PAGE, write_page

LIMIT_S = 480
"""Of the suite on a GPU with its usual arms, its own start and end included."""
_OWN_S = 10
"""Start of this program, and the page."""
_CLOSING_S = 15
"""Of a model's seconds: the start of its process, which it cannot see, and its end after the last step."""
_ALL_ARMS_S = 480
NARROW = "benchmarks/models/narrow-{}.json"
logger = logging.getLogger("benchmarks.train_step_all")


@dataclass(frozen=True)
class Entry:
    """One process: one model against its rivals."""

    model: str
    batch_size: int
    seconds: float
    """Of its own: start, compilation, everything. Planned, from modelled step times."""
    rivals: tuple[str, ...] = ("open_clip",)
    needs_s: float = 0
    """Not started with less than this."""
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Of a run, for our arm."""

    def words(self) -> list[str]:
        """Arguments of ``benchmarks.train_step``, without time and place."""
        own = [f"--model={self.model}", f"--batch-size={self.batch_size}", "--rivals", *self.rivals, *self.options]
        return [*own, "--", *self.flags] if self.flags else own


_GPU_OPTIONS = (
    *("--device=cuda", "--precision=amp_bf16", "--batches=3", "--parity-steps=2", "--warmup-steps=3"),
    *("--blocks=10", "--block-steps=5", "--rewarm-steps=1", "--least-steps=30"),
)
_TUNED = "open_clip_tuned"


def _on_gpu(model: str, batch_size: int, seconds: float, *rivals: str, needs_s: float = 0) -> Entry:
    rivals = rivals or ("open_clip",)
    return Entry(model, batch_size, seconds, rivals, needs_s, options=_GPU_OPTIONS, flags=("--torchcompile",))


# OpenCLIP's whole-model compilation takes minutes for the large models: in the short plan one small model has it, and
# one large one if time is left.
GPU = (
    _on_gpu("ViT-B-32-256", 896, 115, "open_clip", _TUNED),
    _on_gpu("ViT-L-14", 256, 65),
    _on_gpu("ViT-H-14", 128, 75),
    _on_gpu("convnext_xxlarge", 80, 80),
    _on_gpu("ViT-B-32", 896, 42),
    _on_gpu("convnext_base_w", 256, 50),
    _on_gpu("ViT-B-16", 448, 43),
    _on_gpu("ViT-L-14", 256, 0, _TUNED, needs_s=110),
    _on_gpu("convnext_xxlarge", 256, 0, "open_clip_checkpointed", needs_s=150),
)
_CPU_OPTIONS = ("--device=cpu", "--precision=fp32", "--no-memory", "--least-steps=4", "--time-limit-s=30")
CPU = (
    Entry(NARROW.format("ViT-B-32"), 16, 1200, options=_CPU_OPTIONS),
    Entry(NARROW.format("convnext"), 16, 1200, options=_CPU_OPTIONS),
)
_CLOCKS = {"ratio": "", "processor_time_ratio": " by processor time"}
SUITES = {"gpu": GPU, "cpu": CPU}


class Outcome(NamedTuple):
    """What became of one entry."""

    model: str
    batch_size: int
    rivals: tuple[str, ...]
    status: str
    """measured, failed, stopped (by its limit), or skipped (no time was left for it)."""
    seconds: float
    message: str
    file: str


Runner = Callable[[Entry, float], Outcome]
"""Measures an entry within that many seconds."""


def parse_command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the suite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step_all", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--suite", default="gpu", choices=tuple(SUITES))
    parser.add_argument("--arms", default="usual", choices=("usual", "all"))
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models of the suite")
    parser.add_argument("--full-length", action="store_true", help="every caption as long as the context")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--results", type=Path, help="folder (GPU: benchmarks/results; CPU: none is kept)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; measure nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; 1 if anything failed."""
    started = time.monotonic()
    arguments = parse_command_line(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    use_open_clip_checkout(arguments.open_clip_path, may_restart=argv is None)
    entries = list(plan(arguments))
    if arguments.dry_run:
        sys.stdout.write(describe_plan(entries))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        keeps = arguments.suite == "gpu" or arguments.results is not None
        folder = (arguments.results or RESULTS) if keeps else Path(scratch)
        outcomes = run_all(entries, lambda entry, seconds: run_entry(entry, seconds, folder), started=started)
        if keeps:
            write_outcomes(outcomes, folder / f"train_step_suite_{arguments.suite}.json", arguments)
    if keeps and folder.resolve() == RESULTS.resolve():
        write_page(PAGE)
    sys.stdout.write(describe_outcomes(outcomes))
    return 1 if any(outcome.status in failures(arguments.suite) for outcome in outcomes) else 0


def failures(suite: str) -> tuple[str, ...]:
    """What the command fails by. A CPU that others use may be as slow as it likes: its stops are warnings."""
    return ("failed",) if suite == "cpu" else ("failed", "stopped")


def plan(arguments: argparse.Namespace) -> Iterator[Entry]:
    """The entries of a suite, in the order of their importance.

    Raises:
        ValueError: a model that the suite does not have.
    """
    entries = SUITES[arguments.suite]
    known = {entry.model for entry in entries}
    if unknown := set(arguments.only or ()) - known:
        raise ValueError(f"--only {' '.join(sorted(unknown))}: the suite has {', '.join(sorted(known))}")
    extra = ["--full-length"] if arguments.full_length else []
    extra += [f"--open-clip-path={arguments.open_clip_path.resolve()}"] if arguments.open_clip_path else []
    for entry in entries:
        if arguments.only and entry.model not in arguments.only:
            continue
        if arguments.arms == "all" and entry.rivals == (_TUNED,):
            continue  # among the others then
        if arguments.arms == "all":
            entry = replace(entry, rivals=tuple(RIVALS), seconds=max(entry.seconds, _ALL_ARMS_S))
        yield replace(entry, options=(*entry.options, *extra))


def run_all(
    entries: Sequence[Entry], run: Runner, *, started: float, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    """One after the other, whatever becomes of each; what one leaves of its time is the next one's."""
    outcomes = []
    end = started + _OWN_S
    for entry in entries:
        end += entry.seconds
        left = end - clock()
        if left <= max(entry.needs_s, _CLOSING_S):
            message = f"{left:.0f} s are left, and it needs {max(entry.needs_s, _CLOSING_S):.0f}"
            outcome = Outcome(entry.model, entry.batch_size, entry.rivals, "skipped", 0.0, message, "")
        else:
            logger.info("== %s, batch %d, %s: %.0f s", entry.model, entry.batch_size, ", ".join(entry.rivals), left)
            outcome = run(entry, left)
        outcomes.append(outcome)
        if outcome.message:
            logger.info("== %s: %s: %s", entry.model, outcome.status, outcome.message)
    return outcomes


def run_entry(entry: Entry, seconds: float, folder: Path) -> Outcome:
    """In a process of its own, so that its memory is free afterwards; ended with all it started when time is up."""
    words = entry.words()
    path = folder / f"{result_name(parse_arguments(words))}.json"
    # Before the entry's own options: what they say about time comes later and wins.
    timed = [f"--time-limit-s={max(1.0, seconds - _CLOSING_S):.0f}", f"--out={path}", *words]
    start, begun = time.monotonic(), time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.train_step", *timed],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    is_stopped = False
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        is_stopped = True
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    sys.stderr.write(errors)
    took = time.monotonic() - start
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    status, message = "measured", ""
    is_new = path.exists() and path.stat().st_mtime >= begun  # an older run's file is not this one's
    found = describe_ratios(path) if is_new else ""
    if process.returncode == 0:
        message = found
    if is_stopped:
        status, message = "stopped", f"not done after {seconds:.0f} s; its last words: {last}"
    elif process.returncode != 0:
        status, message = "failed", f"exit code {process.returncode}: {last}"
    if status != "measured" and found:
        message += f"; kept: {found}"
    return Outcome(entry.model, entry.batch_size, entry.rivals, status, took, message, path.name if is_new else "")


def describe_ratios(path: Path) -> str:
    """What a person wants to know of a result file."""
    said = []
    for rival, comparison in json.loads(path.read_text())["comparisons"].items():
        ratios = [f"{comparison[key]['value']:.2f}{by}" for key, by in _CLOCKS.items() if key in comparison]
        reasons = [f"{key}: {comparison[key]}" for key in ("void", "unfinished") if key in comparison]
        reasons += ["out of memory"] if "out_of_memory" in comparison else []
        said.append(f"{rival} {', '.join(ratios or reasons)}")
    return "; ".join(said)


def describe_plan(entries: Sequence[Entry]) -> str:
    """For people: who is measured when."""
    lines, begin = [], float(_OWN_S)
    for entry in entries:
        end = begin + entry.seconds
        condition = f" (if {entry.needs_s:.0f} s are left)" if entry.needs_s else ""
        when = f"{begin:5.0f} to {end:4.0f} s"
        lines.append(f"{when}  {entry.model:18s} batch {entry.batch_size:4d}  {', '.join(entry.rivals)}{condition}")
        begin = end
    return "\n".join([*lines, f"{begin:.0f} s at most; times within it are planned, not measured", ""])


def describe_outcomes(outcomes: Sequence[Outcome]) -> str:
    """For a log: how each ended."""
    lines = [
        f"{outcome.model.removesuffix('.json').rpartition('/')[2]:18s} {outcome.status} in {outcome.seconds:.0f} s"
        f"{f': {outcome.message}' if outcome.message else ''}"
        for outcome in outcomes
    ]
    return "\n".join([*lines, ""])


def write_outcomes(outcomes: Sequence[Outcome], path: Path, arguments: argparse.Namespace) -> None:
    """What ran, and what did not."""
    device = torch.device("cuda" if arguments.suite == "gpu" and torch.cuda.is_available() else "cpu")
    settings = {"arms": arguments.arms, "full_length": arguments.full_length, "only": arguments.only}
    result = {"benchmark": "train_step_all", "settings": settings, "run": describe_run(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [outcome._asdict() for outcome in outcomes]
    path.write_text(json.dumps({**result, "outcomes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
