"""Compares what the ranks of a hanging job were doing, and says which of them the others wait for. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

_BLAMED = re.compile(
    r"hang: ranks? ([\d, .]+?)"
    r"(?:, or the launcher| (?:is|are) silent| \(process \d+ on \S+\) (?:has made no progress|gave no sign of life))"
)
"""The beginning of what the functions below, and the heartbeat's monitor, say of a rank."""


class Note(NamedTuple):
    """What one rank was doing when one of them saw no progress."""

    rank: int
    step: int
    """Steps done; 0 before the first."""
    phase: str
    idle_s: float
    """Seconds since this rank last made progress."""
    where: str
    """The innermost line of the training code that its main thread is in."""
    collective: str = ""
    """The newest that it has asked for; empty if that is not known."""
    number: int = -1
    started: int = -1
    """The newest one that runs on its device."""
    waiting: bool = False
    """Whether that is not done."""
    host: str = ""
    pid: int = 0


class Verdict(NamedTuple):
    """Who holds up the job."""

    rank: int
    text: str
    silent: tuple[int, ...] = ()
    """Ranks that could not even be asked."""


def blame(notes: Sequence[Note], *, world_size: int, left: Collection[int] = ()) -> Verdict:
    """The rank that the others wait for.

    Args:
        notes: one of each rank that answered, at least one.
        left: ranks that are done, and no longer asked.
    """
    answered = {note.rank for note in notes}
    silent = tuple(rank for rank in range(world_size) if rank not in answered and rank not in left)
    if silent:
        done = max(note.step for note in notes)
        are = "are" if len(silent) > 1 else "is"
        return Verdict(
            silent[0],
            f"{_ranks(silent)} {are} silent since step {done}: stopped, dead, or stuck in native code{_waiting(notes)}",
            silent,
        )
    behind = [note for note in notes if _place(note) == min(map(_place, notes))]
    if len(behind) == len(notes):
        behind = [note for note in notes if not note.waiting]
    if behind:
        others = [note for note in notes if note not in behind]
        return Verdict(behind[0].rank, f"{'; '.join(map(_describe, behind[:4]))}{_waiting(others)}")
    text = f"all ranks wait in {_collective(notes[0])}, asked for at {notes[0].where}, and it does not end: the network"
    return Verdict(min(answered), text)


def host_silent(note: Note, *, error: str) -> Verdict:
    """For a rank that cannot reach the others: the process that hosts the store does not answer."""
    return Verdict(
        0,
        f"rank 0, or the launcher on its node, is silent since step {note.step}: stopped, or stuck in native code "
        f"({error}){_waiting([note])}",
        (0,),
    )


def blamed_ranks(text: str) -> tuple[int, ...]:
    """The ranks that the text of a verdict holds responsible; empty if it blames the network, or is no verdict."""
    if match := _BLAMED.search(text):
        return tuple(int(rank) for rank in match[1].split(", ") if rank != "...")
    return ()


def _place(note: Note) -> tuple[int, int, int]:
    return note.step, note.number, note.started


def _describe(note: Note) -> str:
    return (
        f"rank {note.rank} (process {note.pid} on {note.host}) has made no progress for {note.idle_s:.0f} s after "
        f"step {note.step}, in {note.phase}, at {note.where}"
    )


def _waiting(notes: Sequence[Note]) -> str:
    """Where those are that wait, in few words: a job may have a thousand of them."""
    places: dict[str, list[int]] = {}
    for note in notes:
        what = f"in {_collective(note)}" if note.waiting else f"at {note.where}"
        places.setdefault(what, []).append(note.rank)
    lines = [f"{_ranks(ranks)} wait{'s' * (len(ranks) == 1)} for it {what}" for what, ranks in places.items()]
    return "".join(f"; {line}" for line in lines[:4])


def _collective(note: Note) -> str:
    return f"{note.collective} #{note.number}" if note.collective else "a collective"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
