"""Makes every figure of docs/scale.md anew, prints the tables, and puts them into the document.

    python -m benchmarks.scale_all [--only scale_lanes ...] [--tables]

One process per benchmark, one after the other: what one of them holds must not be counted by the next. ``--tables``
measures nothing and writes the document from the results that are there. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    scale_checkpoints,
    scale_goodput,
    scale_lanes,
    scale_loss,
    scale_memory,
    scale_network,
    scale_rank,
    scale_startup,
    scale_store,
)
from benchmarks.provenance import ROOT
from benchmarks.scale_report import DOCUMENT, RESULTS, Result, Tables, fill, load

# In an order in which each finds what it builds on.
BENCHMARKS: dict[str, Callable[[Result], Tables]] = {
    scale_startup.NAME: scale_startup.tables,
    scale_store.NAME: scale_store.tables,
    scale_lanes.NAME: scale_lanes.tables,
    scale_checkpoints.NAME: scale_checkpoints.tables,
    scale_rank.NAME: scale_rank.tables,
    scale_memory.NAME: scale_memory.tables,
    scale_loss.NAME: scale_loss.tables,
    scale_network.NAME: scale_network.tables,
    scale_goodput.NAME: scale_goodput.tables,
}
logger = logging.getLogger("benchmarks.scale_all")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_all", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the document from the results")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in () if arguments.tables else arguments.only:
        logger.info("%s", name)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=True)
    arguments.document.write_text(fill(arguments.document.read_text(), all_tables()))


def all_tables(directory: Path = RESULTS) -> Tables:
    """Of all results, by name."""
    return {name: text for key, tables in BENCHMARKS.items() for name, text in tables(load(key, directory)).items()}


if __name__ == "__main__":
    main()
