"""Keeps the list of nodes that a run had better not use again: RUN/bad_nodes.jsonl, one line for each suspicion.

    {"node": "jwb0042", "reason": "hang: rank 168 (process 411 on jwb0042) has made ...", "time": "2026-..."}

A suspicion lasts a day: by then somebody has looked at the node, or it was nothing. The batch script asks

    python -m slurm.bad_nodes blame RUN ...      whose fault was this? on the list with them
    python -m slurm.bad_nodes exclude RUN ...    what the next start has to do without
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from slurm.node_list import expand
from training.resilience.hang import blamed_ranks

BAD_NODES_FILE = "bad_nodes.jsonl"
VALID = timedelta(hours=24)
_USABLE_STATES = {"alloc", "allocated", "comp", "completing", "idle", "mix", "mixed", "planned", "resv", "reserved"}
"""Of a node that is there, whoever uses it now."""
_USABLE_MARKS = "~#%!+-^@"
"""Powered down until a job needs it, on its way up or down, promised to another job, to be rebooted. Not ``*``, which
does not respond, and not ``$``, which is reserved for maintenance. Source: sinfo(1), NODE STATE CODES."""
_HARDWARE = re.compile(
    r"uncorrectable (?:NVLink|ECC)|GPU is lost|fallen off the bus|device\(s\) is/are busy or unavailable|"
    r"no CUDA-capable device|hardware error|Bus error",
    re.IGNORECASE,
)
"""In what a rank says last: of these no program is the cause."""
_FAILED_FIRST = re.compile(r"rank (\d+) failed first: ?(.*)", re.DOTALL)
_LOG_TIME = re.compile(r"^(?:rank \d+ \| )?(\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d) \| ", re.MULTILINE)
_LAUNCH = re.compile(r"Task launch for StepId=\S+ failed on node (\S+?): (.*)")
_TAIL_BYTES = 1 << 18
"""Of a log: more than the last words of a job, less than a day of them."""


class Suspect(NamedTuple):
    """A node, and why."""

    node: str
    reason: str
    time: datetime


def record_suspects(path: Path, suspects: Iterable[tuple[str, str]], *, time: datetime | None = None) -> None:
    """Adds (node, reason) to the list, durably; a line that a crash cut does not swallow the first of them."""
    now = (time or datetime.now(UTC)).isoformat(timespec="seconds")
    lines = [json.dumps({"node": node, "reason": reason, "time": now}) + "\n" for node, reason in suspects]
    if not lines:
        return
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut else "") + "".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_suspects(path: Path, *, now: datetime | None = None) -> list[Suspect]:
    """The nodes under suspicion, newest first, each once; lines that cannot be read are left out."""
    oldest = (now or datetime.now(UTC)) - VALID
    found: dict[str, Suspect] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            suspect = Suspect(str(record["node"]), str(record["reason"]), datetime.fromisoformat(record["time"]))
            if suspect.time > oldest:
                found[suspect.node] = suspect
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(found.values(), key=lambda suspect: suspect.time, reverse=True)


def choose_excluded(
    suspects: Sequence[Suspect], *, usable: Collection[str] | None, needed: int, always: Collection[str] = ()
) -> list[str]:
    """The suspected nodes that a job can do without: the newest of them, while enough others are left.

    A job that excludes more waits for ever, and nobody is there to see it.

    Args:
        suspects: newest first.
        usable: nodes of the partition that are up; None if nobody knows, and then all suspects are excluded.
        needed: nodes of the job.
        always: nodes that the user has excluded, and that are no help either.
    """
    if usable is None:
        return [suspect.node for suspect in suspects]
    spare = len(set(usable) - set(always)) - needed
    chosen = []
    for suspect in suspects:
        costs = suspect.node in usable and suspect.node not in always
        if costs and spare <= 0:
            continue
        spare -= costs
        chosen.append(suspect.node)
    return chosen


def blame(run: Path, nodes: Sequence[str], *, tasks: int, since: datetime, messages: str = "") -> list[tuple[str, str]]:
    """(node, reason) of those that the end of a start is put down to; empty for an ordinary crash.

    Args:
        run: its directory.
        nodes: of the job, in SLURM's order: the ranks lie on them in blocks.
        tasks: ranks per node.
        since: when the start began.
        messages: what srun has said.
    """

    def node_of(rank: int) -> str | None:
        return nodes[rank // tasks] if rank // tasks < len(nodes) else None

    found: dict[str, str] = {}
    for ranks, reason in (*_divergences(run, since), *_last_words(run, since)):
        for rank in ranks:
            if (node := node_of(rank)) is not None:
                found.setdefault(node, reason)
    for node, reason in _LAUNCH.findall(messages):
        # SLURM forgets the credentials of a job whose node was away for a moment: no fault of the node.
        if node in nodes and "credential" not in reason:
            found.setdefault(node, f"SLURM cannot start tasks there: {reason}")
    # What is wrong everywhere is not wrong with a node.
    return list(found.items()) if len(found) == 1 or 2 * len(found) <= len(nodes) else []


def _divergences(run: Path, since: datetime) -> list[tuple[Sequence[int], str]]:
    """Of ranks whose parameters came to differ from all others'."""
    path = run / "events.jsonl"
    found: list[tuple[Sequence[int], str]] = []
    for line in _tail(path).splitlines():
        try:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "replicas differ" and datetime.fromisoformat(event["time"]) >= since:
                found.append((event["ranks"], f"step {event['step']}: parameters differ from all other ranks'"))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _last_words(run: Path, since: datetime) -> list[tuple[Sequence[int], str]]:
    """Of the rank that failed first, where a hang or its device was the cause.

    Rank 0 may be the one that can say nothing any more: then every other rank has said it.
    """
    for path in (run / "out.log", *sorted((run / "slurm").glob("rank-*.log"))[1:]):
        for text in reversed(_lines_since(_tail(path), since)):
            if match := _FAILED_FIRST.search(text):
                rank, words = int(match[1]), match[2].strip()
                last = words.splitlines()[-1] if words else ""
                if ranks := blamed_ranks(words):
                    return [(ranks, last)]
                return [((rank,), last)] if _HARDWARE.search(words) else []
    return []


def _lines_since(text: str, since: datetime) -> list[str]:
    """The records of a log that are not older, each with the lines that belong to it."""
    starts = [match.start() for match in _LOG_TIME.finditer(text)] + [len(text)]
    records = [text[begin:end] for begin, end in zip(starts, starts[1:], strict=False)]
    return [record for record in records if _time_of(record) >= since]


def _time_of(record: str) -> datetime:
    """In the local time of the nodes, which all share one zone."""
    match = _LOG_TIME.match(record)
    assert match is not None
    return datetime.strptime(match[1], "%Y-%m-%d,%H:%M:%S").astimezone()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def usable_nodes(partition: str) -> set[str] | None:
    """Names of the nodes of a partition that jobs can run on; None where SLURM does not say."""
    command = ["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {node for node, state in map(str.split, shown.splitlines()) if state.rstrip(_USABLE_MARKS) in _USABLE_STATES}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line that the batch script uses; prints names with commas between them."""
    arguments = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], list[str]] = arguments.act
    sys.stdout.write("".join(f"{line}\n" for line in [",".join(act(arguments))] if line))
    return 0


def _blame(arguments: argparse.Namespace) -> list[str]:
    path: Path | None = arguments.messages
    found = blame(
        arguments.run,
        arguments.nodes.split(","),
        tasks=arguments.tasks_per_node,
        since=datetime.fromtimestamp(arguments.since, UTC),
        messages=path.read_text(errors="replace") if path is not None and path.exists() else "",
    )
    record_suspects(arguments.run / BAD_NODES_FILE, found)
    return [node for node, _ in found]


def _exclude(arguments: argparse.Namespace) -> list[str]:
    always = expand(arguments.always)
    suspects = read_suspects(arguments.run / BAD_NODES_FILE)
    chosen = choose_excluded(suspects, usable=usable_nodes(arguments.partition), needed=arguments.needed, always=always)
    for suspect in suspects:
        if suspect.node not in chosen:
            sys.stderr.write(f"{suspect.node} is suspected ({suspect.reason}), but too few other nodes are up.\n")
    if arguments.among is not None:
        return [node for node in arguments.among.split(",") if node in chosen]
    return [*always, *(node for node in chosen if node not in always)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.bad_nodes", description=__doc__)
    commands = parser.add_subparsers(required=True)
    accuse = commands.add_parser("blame", help="put on the list whom the end of a start is put down to, and print them")
    accuse.add_argument("run", type=Path)
    accuse.add_argument("--nodes", required=True, help="of the job, in SLURM's order, with commas between them")
    accuse.add_argument("--tasks-per-node", type=int, required=True)
    accuse.add_argument("--since", type=float, required=True, help="when the start began, in seconds since 1970")
    accuse.add_argument("--messages", type=Path, help="a file with what srun has said")
    accuse.set_defaults(act=_blame)
    spare = commands.add_parser("exclude", help="print the nodes that the next start has to do without")
    spare.add_argument("run", type=Path)
    spare.add_argument("--partition", required=True)
    spare.add_argument("--needed", type=int, required=True, help="nodes of the job")
    spare.add_argument("--always", default="", help="nodes that the user has excluded")
    spare.add_argument("--among", help="print only suspected nodes among these")
    spare.set_defaults(act=_exclude)
    return parser


if __name__ == "__main__":
    sys.exit(main())
