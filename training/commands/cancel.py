"""``clipyard cancel RUN``: ends a run for good. It is saved first, and does not requeue.

``scancel`` alone looks like a preemption to the job, which may then put itself back into the queue.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.cancel import Cancelled, cancel_run


def main(argv: Sequence[str]) -> int:
    """Exit code 2 for a directory that is no run, 1 if the run cannot be reached or does not end."""
    parser = argparse.ArgumentParser(prog="clipyard cancel", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's directory: --logs joined with --name")
    parser.add_argument("--grace", type=float, metavar="S", help="seconds to save in (as planned; at least 300)")
    parser.add_argument("--now", action="store_true", help="do not wait for a save; SLURM ends the job at once")
    arguments = parser.parse_args(argv)
    grace_s = 0.0 if arguments.now else arguments.grace
    try:
        cancelled = cancel_run(arguments.run, grace_s=grace_s, say=lambda text: _say(f"{text}."))
    except ValueError as error:
        sys.stderr.write(f"clipyard cancel: {error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"clipyard cancel: {error}\n")
        return 1
    _say(report(arguments.run, cancelled))
    return 0


def report(run: Path, cancelled: Cancelled) -> str:
    """What was ended, and what is left to go on from."""
    if cancelled.jobs:
        ended = f"Ended job {', '.join(cancelled.jobs)}."
    elif cancelled.process is not None:
        ended = f"Ended process {cancelled.process}."
    else:
        ended = "Nothing was running."
    if cancelled.step_after > cancelled.step_before:
        saved = f"Saved at step {cancelled.step_after}."
    elif cancelled.step_after:
        saved = f"The newest checkpoint is that of step {cancelled.step_after}."
    else:
        saved = "There is no checkpoint."
    return f"{ended} {saved} {run / '.no-requeue'} keeps it from starting again; `clipyard submit` removes it."


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
