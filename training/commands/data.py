"""``clipyard data COMMAND``: look at, index, time and trace training data."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training.commands.main import Command, dispatch

DATA_COMMANDS: dict[str, Command] = {
    "inspect": Command("training.commands.data_inspect", "count samples, sizes, captions and broken samples of shards"),
    "index": Command("training.commands.data_index", "read every shard to its end; write sizes.json and byte offsets"),
    "bench": Command("training.commands.data_bench", "samples per second of a loader worker, and where the time goes"),
    "trace": Command("training.commands.data_trace", "list the samples that a step of a run consumed"),
}


def main(argv: Sequence[str]) -> int:
    """Run one of the data commands."""
    return dispatch("clipyard data", DATA_COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
