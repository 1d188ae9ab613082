"""Writes the results of the scale benchmarks, and puts their tables into docs/scale.md.

In the document a table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. Nobody writes there by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, describe_run

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "scale.md"
Result = dict[str, Any]
Tables = dict[str, str]
_TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def run_benchmark(
    name: str,
    measure: Callable[..., Result],
    tables: Callable[[Result], Tables],
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of one benchmark: measures, writes the JSON, prints the tables."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--small", action="store_true", help="tiny numbers: shows that it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    arguments = parser.parse_args(argv)
    run = describe_run(torch.device("cpu"))  # before: the load is that of others
    result = measure(small=arguments.small)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"benchmark": name, "run": run, **result}, indent=1) + "\n")
    for text in tables(result).values():
        sys.stdout.write(text + "\n")


def load(name: str, directory: Path = RESULTS) -> Result:
    """What a benchmark wrote.

    Raises:
        ValueError: it has not run.
    """
    path = directory / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{path} is not there: run python -m benchmarks.{name}, or benchmarks.scale_all for all.")
    result: Result = json.loads(path.read_text())
    return result


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The document with its tables replaced.

    Raises:
        ValueError: a table that the document has no place for, or a place without its table.
    """
    places = {match[2] for match in _TABLE.finditer(text)}
    if places != tables.keys():
        differing = ", ".join(sorted(places ^ tables.keys()))
        raise ValueError(f"tables and places in the document differ: {differing}; correct docs/scale.md.")
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}", text)


def seconds(value: float) -> str:
    """For people: 0.4 ms, 3.1 s, 12 min."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 300 else f"{value / 60:.0f} min"


def num_bytes(value: float) -> str:
    """For people: 12 kB, 605 MB, 14.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"
