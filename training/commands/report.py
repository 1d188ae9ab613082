"""``clipyard report RUN``: writes RUN/report.html, one page about the run that needs no other file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.checkpoint.checkpointer import Checkpointer
from training.naming import STARTS_FILE
from training.observability.events import read_events
from training.observability.history import read_starts
from training.observability.report import RunRecord, SavedStep, render_report


def main(argv: Sequence[str]) -> int:
    """Writes the page and prints its path; exit code 2 if there is no such run, or nowhere to write."""
    parser = argparse.ArgumentParser(prog="clipyard report", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's directory: --logs joined with --name")
    parser.add_argument("--output", type=Path, help="where to write; RUN/report.html unless given")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output or arguments.run / "report.html"
    try:
        output.write_text(render_report(read_run(arguments.run)), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"clipyard report: {error}\n")
        return 2
    sys.stdout.write(f"{output}\n")
    return 0


def read_run(run: Path) -> RunRecord:
    """What a run's directory tells.

    Raises:
        ValueError: it is no run's.
    """
    metrics, starts = run / "metrics.jsonl", run / STARTS_FILE
    if not metrics.is_file() and not starts.is_file():
        raise ValueError(f"{str(run)!r} is no run: it has no metrics.jsonl. Pass --logs joined with --name.")
    config = run / "config.yaml"
    return RunRecord(
        name=run.resolve().name,
        metrics=_read_metrics(metrics),
        events=read_events(run / "events.jsonl"),
        starts=read_starts(starts),
        checkpoints=_checkpoints(run / "checkpoints"),
        settings=config.read_text() if config.is_file() else "",
    )


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines that a crash cut, or that a run is just writing, are left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def _checkpoints(root: Path) -> list[SavedStep]:
    checkpointer = Checkpointer(root)
    tags = checkpointer.tags()
    best = tags.best
    saved = []
    for step in checkpointer.steps():
        sizes = [file.stat().st_size for file in checkpointer.path(step).iterdir() if file.is_file()]
        names = ["good"] * (step in tags.good) + ["suspect"] * (step in tags.suspect)
        if best is not None and best.step == step:
            names.append(f"best {best.metric} = {best.value:.5g}")
        saved.append(SavedStep(step, sum(sizes), tuple(names)))
    return saved


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
