"""``clipyard status RUN``: whether a run waits, trains or has ended, how far it is, and what happened to it.

Works on every run directory, also of runs that were not started by ``clipyard submit``, and without SLURM.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from slurm.run_status import read_status, render_status


def main(argv: Sequence[str]) -> int:
    """Prints one page per run; exit code 2 for a directory that is none."""
    parser = argparse.ArgumentParser(prog="clipyard status", description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="the run's directory: --logs joined with --name")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run instead")
    arguments = parser.parse_args(argv)
    code = 0
    for place, run in enumerate(arguments.run):
        try:
            status = read_status(run, now=datetime.now(UTC))
        except ValueError as error:
            sys.stderr.write(f"clipyard status: {error}\n")
            code = 2
            continue
        if arguments.json:
            sys.stdout.write(json.dumps(asdict(status)) + "\n")
        else:
            sys.stdout.write(("\n" if place else "") + render_status(status))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
