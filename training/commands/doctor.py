"""``clipyard doctor``: can these nodes be trained on? Looks at each of them in a minute, before training takes days.

Alone on a machine, or as a step of a job with one task for each GPU:

    srun --kill-on-bad-exit=1 clipyard doctor --slurm --run RUN

Exit codes: 0 nothing speaks against these nodes; 95 some are to be excluded (printed, and added to
RUN/bad_nodes.jsonl); 2 something is wrong that other nodes would not mend; 1 the ranks did not meet: no verdict.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from slurm.bad_nodes import BAD_NODES_FILE, read_suspects, record_suspects
from slurm.environment import is_in_step
from training.cli import parse
from training.config import Config
from training.resilience.exit_codes import BAD_USAGE, NODE_SUSPECTED
from training.validation import logs_disabled

_ARRIVAL_LIMIT_S = 300.0
"""A cold import of torch by a thousand ranks takes minutes; when all have come, nobody waits."""
_RECORDED_SETTINGS = ("submit.yaml", "config.yaml")
_NO_DATA = ("--dataset-type=synthetic", "--train-num-samples=1")
"""A trainer needs data to start; an examination does not."""


def main(argv: Sequence[str]) -> int:
    """Examines, prints a table, and returns the verdict as an exit code."""
    parser = argparse.ArgumentParser(
        prog="clipyard doctor",
        description=__doc__,
        epilog="All other flags are the trainer's (--config FILE, --train-data, ...): they say what the run will need.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, help="the run's directory; else --logs joined with --name")
    parser.add_argument("--slurm", action="store_true", help="refuse to run where srun did not start it")
    parser.add_argument("--quick", action="store_true", help="10 seconds instead of 60: shorter, and fewer pairs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was found")
    parser.add_argument(
        "--arrival-limit", type=float, default=_ARRIVAL_LIMIT_S, metavar="S", help="to wait for nodes to appear"
    )
    arguments, flags = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s | %(message)s")
    run: Path | None = arguments.run
    try:
        if arguments.slurm and not is_in_step(os.environ):
            raise ValueError(
                "--slurm, but no srun started this process: `srun clipyard doctor --slurm`, or leave it out"
            )
        config = read_config(flags, arguments.run)
        run = find_run(config, arguments.run)
        # What torch says about sockets is about its own attempts; the verdict is ours.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # Here and not above: a node without torch, or with a broken one, must be able to say so.
        session = import_module("training.diagnosis.session")
        order = session.Order(config, run, arguments.json, arguments.quick, arguments.arrival_limit)
        code: int = session.hold_session(order, os.environ)
    except ValueError as error:
        sys.stderr.write(f"clipyard doctor: {error}\n")
        return BAD_USAGE
    except (ImportError, OSError) as error:
        return _cannot_begin(error, run)
    return code


def read_config(flags: Sequence[str], run: Path | None) -> Config:
    """From the trainer's flags; without any, from what the run directory holds. Data need not be named.

    Raises:
        ValueError: a flag is wrong.
    """
    recorded = [run / name for name in _RECORDED_SETTINGS if run is not None and (run / name).is_file()]
    if recorded and not flags:
        return parse([f"--config={recorded[0]}"]).config
    try:
        return parse(flags).config
    except ValueError:
        if has_data(flags):
            raise
    return parse([*flags, *_NO_DATA]).config


def has_data(flags: Sequence[str]) -> bool:
    """Whether a command line says what the run reads, itself or in a file."""
    return any(flag.startswith(("--config", "--train-data", "--val-data", "--dataset-type")) for flag in flags)


def find_run(config: Config, given: Path | None) -> Path | None:
    """The run directory, which need not exist yet; None where none is named."""
    if given is not None:
        return given.absolute()
    if config.logging.name is None or logs_disabled(config.logging.logs):
        return None
    return (Path(config.logging.logs) / config.logging.name).absolute()


def _cannot_begin(error: Exception, run: Path | None) -> int:
    node = os.environ.get("SLURMD_NODENAME")
    reason = f"cannot begin ({type(error).__name__}: {error})"
    sys.stderr.write(f"clipyard doctor: {node or 'this machine'}: {sys.executable} {reason}\n")
    # Only rank 0 may end with a code above 0: it must live to name this node, under srun --kill-on-bad-exit.
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return 0
    if node is None:
        return BAD_USAGE
    return _suspect_own_node(node, f"doctor: {reason}"[:500], run)


def _suspect_own_node(node: str, reason: str, run: Path | None) -> int:
    """Rank 0 cannot ask the others how they are. If a node before it said the same, then it is not the node."""
    if run is None:
        return NODE_SUSPECTED
    path = run / BAD_NODES_FILE
    try:
        others = [suspect.node for suspect in read_suspects(path) if suspect.node != node and suspect.reason == reason]
        if others:
            sys.stderr.write(f"clipyard doctor: {others[0]} said the same before: mend the environment of all nodes\n")
            return BAD_USAGE
        run.mkdir(parents=True, exist_ok=True)
        record_suspects(path, [(node, reason)])
    except OSError as error:
        sys.stderr.write(f"clipyard doctor: {node} cannot be put on the list ({error})\n")
    return NODE_SUSPECTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
