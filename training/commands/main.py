"""The ``clipyard`` console script: finds a command in one table and hands it the rest of the line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple, cast


class Command(NamedTuple):
    """Where a command lives, and what it does in a few words."""

    module: str
    """Has ``main(argv) -> int | None``. Imported only when called: `clipyard --help` must not pay for torch."""
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("training.main", "train a model; the same as python -m training.main"),
    "make-demo-data": Command("training.commands.make_demo_data", "write the demo shards and evaluation sets"),
    "demo-result": Command("training.commands.demo_result", "print what a demo run has learned"),
    "data": Command("training.commands.data", "look at, index, time and trace training data"),
    "checkpoints": Command("training.commands.checkpoints", "list, verify, export, average and mirror checkpoints"),
    "report": Command("training.commands.report", "write a page about a run: curves, starts, events, checkpoints"),
    "submit": Command("training.commands.submit", "check, plan and submit a run to SLURM"),
    "status": Command("training.commands.status", "say what a run is doing, how far it is, and what happened to it"),
    "logs": Command("training.commands.logs", "print or follow the logs of a run, its job or one of its ranks"),
    "cancel": Command("training.commands.cancel", "end a run for good, saved"),
    "doctor": Command("training.commands.doctor", "look for what would make a job fail, on this machine or in a job"),
    "models": Command("training.commands.models", "list model names with parameters and cost"),
}


def find_command(name: str, commands: Mapping[str, Command] = COMMANDS) -> Command:
    """The table's row for ``name``; unknown names are answered with the nearest one."""
    if name in commands:
        return commands[name]
    near = get_close_matches(name, commands, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"unknown command {name!r}: {hint}Commands: {', '.join(commands)}")


def usage(program: str, commands: Mapping[str, Command]) -> str:
    """The help text: one line per command."""
    width = max(map(len, commands))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in commands.items())
    return f"usage: {program} COMMAND [ARGS]\n\n{rows}\n\n{program} COMMAND --help tells what it takes.\n"


def dispatch(program: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Run one command; the exit code is the command's own, 2 for a line that names none."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage(program, commands))
        return 0 if arguments else 2
    try:
        command = find_command(arguments[0], commands)
    except ValueError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    run = cast("Callable[[Sequence[str]], int | None]", import_module(command.module).main)
    return run(arguments[1:]) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of the console script."""
    return dispatch("clipyard", COMMANDS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
