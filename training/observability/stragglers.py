"""Names the rank that all others wait for, and says whether it is slow at computing or at getting its data.

A step ends on all ranks together, so only a rank's own time tells which of them is late: the wait for its batch, and
what it computes before it first meets the others. Score of a rank = median own time of the *other* ranks / its own: 1
is even, 0.5 is twice as slow. (NVIDIA's NVRx divides by a reference too; without the rank itself in the median two
ranks are enough, and with its upper value, if there are two, a rank must be slower than half of the others.)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SLOW_SCORE = 0.75
"""Below it a rank is slow."""
WORTH_NAMING = 0.05
"""A slow rank is named if it costs at least this part of a step: a wait of 2 ms instead of 1 ms is nothing."""
PATIENCE = 5
"""Log points in a row with the same slow rank, until it is named: one slow moment is nothing either."""
SILENCE = 50
"""Log points until the same rank is named again."""
LISTED_RANKS = 16
"""Up to so many ranks each has metrics of its own; of more, the slowest has."""


class RankTimes(NamedTuple):
    """Seconds per step, in rank order, in the mean over the steps since the last log point."""

    compute_s: Sequence[float]
    """What a rank computed before it met the others."""
    data_wait_s: Sequence[float]

    @property
    def own_s(self) -> list[float]:
        """Both together: how late the rank is at the first collective."""
        return [sum(times) for times in zip(self.compute_s, self.data_wait_s, strict=True)]


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow for a while, with its newest times, per step."""

    rank: int
    host: str
    section: str
    """Where it loses more of its time: ``data`` or ``compute``."""
    score: float
    compute_s: float
    data_wait_s: float
    others_s: float
    """Median over the other ranks of their own time."""

    def __str__(self) -> str:
        look = (
            "its storage, and its loader's workers (--workers)"
            if self.section == "data"
            else "the clocks and temperature of its device, and what else runs there"
        )
        return (
            f"rank {self.rank} on {self.host} is slow ({self.section}): {self.compute_s:.3f} s of computing and "
            f"{self.data_wait_s:.3f} s of waiting for data in a step, the others {self.others_s:.3f} s together; all "
            f"ranks wait for it. Look at {look}"
        )


class StragglerReport:
    """Takes every rank's times at each log point. Pure: it asks nobody."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """
        Args:
            hosts: of each rank.
        """
        self._hosts = hosts
        self._suspect: int | None = None
        self._suspected = 0
        """Log points in a row."""
        self._log_points = 0
        self._named_at: dict[int, int] = {}

    def metrics(self, times: RankTimes) -> dict[str, float]:
        """The numbers to log: ``compute/*`` about computing alone, ``straggler/*`` about a rank's whole own time, and
        ``ranks/*`` about every rank where there are few."""
        numbers = {"compute/seconds_mean": statistics.fmean(times.compute_s)}
        if len(times.compute_s) == 1:
            return numbers
        slowest, last = _slowest(times.compute_s), _slowest(times.own_s)
        numbers |= {
            "compute/slowest_rank": float(slowest),
            "compute/seconds_slowest": times.compute_s[slowest],
            "compute/straggler_score": _score(times.compute_s, slowest),
            "straggler/rank": float(last),
            "straggler/score": _score(times.own_s, last),
            "straggler/compute_seconds": times.compute_s[last],
            "straggler/data_wait_seconds": times.data_wait_s[last],
            "straggler/others_seconds": _others(times.own_s, last),
        }
        if len(times.compute_s) <= LISTED_RANKS:
            for rank, (compute_s, data_wait_s) in enumerate(zip(*times, strict=True)):
                numbers[f"ranks/{rank:02d}/compute_seconds"] = compute_s
                numbers[f"ranks/{rank:02d}/data_wait_seconds"] = data_wait_s
        return numbers

    def observe(self, times: RankTimes, *, step_s: float) -> Straggler | None:
        """The rank to be named now; None mostly.

        Args:
            step_s: seconds of a whole step.
        """
        self._log_points += 1
        found = _find_slow(times, self._hosts, step_s=step_s)
        rank = None if found is None else found.rank
        self._suspected = self._suspected + 1 if rank == self._suspect else 1
        self._suspect = rank
        if found is None or self._suspected < PATIENCE:
            return None
        if self._log_points - self._named_at.get(found.rank, -SILENCE) < SILENCE:
            return None
        self._named_at[found.rank] = self._log_points
        return found


def _find_slow(times: RankTimes, hosts: Sequence[str], *, step_s: float) -> Straggler | None:
    if len(hosts) == 1:
        return None
    own_s = times.own_s
    rank = _slowest(own_s)
    score, others_s = _score(own_s, rank), _others(own_s, rank)
    if score >= SLOW_SCORE or own_s[rank] - others_s < WORTH_NAMING * step_s:
        return None
    late_s = {
        "compute": times.compute_s[rank] - _others(times.compute_s, rank),
        "data": times.data_wait_s[rank] - _others(times.data_wait_s, rank),
    }
    section = max(late_s, key=late_s.__getitem__)
    return Straggler(rank, hosts[rank], section, score, times.compute_s[rank], times.data_wait_s[rank], others_s)


def _slowest(seconds: Sequence[float]) -> int:
    return max(range(len(seconds)), key=seconds.__getitem__)


def _others(seconds: Sequence[float], rank: int) -> float:
    return statistics.median_high(value for other, value in enumerate(seconds) if other != rank)


def _score(seconds: Sequence[float], rank: int) -> float:
    return _others(seconds, rank) / seconds[rank] if seconds[rank] > 0 else 1.0
