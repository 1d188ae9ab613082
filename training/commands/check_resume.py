"""Whether a run may go on from its newest checkpoint with other settings, by the trainer's own rules.

``clipyard submit`` runs this in the job's interpreter, before the job waits for hours only to be refused: the settings
(YAML) come on stdin, and what is wrong with them goes to stdout. Needs torch, which a login node's shell need not have.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from training.checkpoint.config_change import check_config_change
from training.checkpoint.manifest import DamagedCheckpoint, read_train
from training.cli import load_config
from training.phases import read_phases

REFUSED = 3
"""The exit code; others mean that nothing could be compared."""


def main(argv: Sequence[str]) -> int:
    """0 if the run may go on, also where a checkpoint cannot be read: the trainer takes the one before then."""
    parser = argparse.ArgumentParser(prog="python -m training.commands.check_resume", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a step directory")
    parser.add_argument("--world-size", type=int, required=True)
    arguments = parser.parse_args(argv)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(sys.stdin.read())
        file.flush()
        config = load_config(Path(file.name))
    try:
        phases = read_phases(config).as_json()
        check_config_change(read_train(arguments.checkpoint), config, world_size=arguments.world_size, phases=phases)
    except DamagedCheckpoint:
        return 0
    except ValueError as error:
        sys.stdout.write(f"{error}\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
