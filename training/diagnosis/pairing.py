"""Deals nodes into pairs, in several rounds, so that no node depends on one partner."""

from __future__ import annotations

from collections.abc import Sequence


def pairings(nodes: Sequence[str], *, rounds: int) -> list[list[tuple[str, str]]]:
    """Rounds of pairs in which nobody meets the same partner twice; with an odd number one node pauses in each.

    The circle method: the first stays, the others move on by one place each round.
    """
    seats: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    dealt = []
    for _ in range(min(rounds, len(seats) - 1)):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        dealt.append([(a, b) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return dealt
