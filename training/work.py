"""Counts the FLOPs that training has cost so far, and what it still will, through all phases. Pure.

Useful ones: of the forward and the backward pass at the phase's image size, patch dropout and text length, nothing
computed twice. Captions count as long as the phase lets them be, whether they are packed or padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from training.phases import Phase, Phases


@dataclass(frozen=True)
class Work:
    """What the samples of each phase cost."""

    phases: Phases
    flops: Sequence[int] | None
    """Per sample, by phase; None where they are not counted."""
    now: Phase
    """The present one."""

    @property
    def flops_per_sample(self) -> int | None:
        """In the present phase."""
        return None if self.flops is None else self.flops[self.now.number - 1]

    def during(self, phase: Phase) -> Work:
        """The same, seen from another phase."""
        return replace(self, now=phase)

    def read(self, seen: int) -> dict[str, float]:
        """Number of the phase, and ``exaflops`` of the first ``seen`` samples; without ``--phases`` nothing."""
        if self.phases.path is None:
            return {}
        numbers = {"phase": float(self.now.number)}
        if self.flops is not None:
            total = sum(samples * self.flops[phase.number - 1] for phase, samples in self._parts(0, seen))
            numbers["exaflops"] = total / 1e18
        return numbers

    def left(self, seen: int, *, total: int) -> float:
        """What remains of a run of ``total`` samples, in samples that cost what the present phase's do."""
        if self.flops is None:
            return float(max(0, total - seen))
        cost = sum(samples * self.flops[phase.number - 1] for phase, samples in self._parts(seen, total))
        return cost / self.flops[self.now.number - 1]

    def _parts(self, begin: int, end: int) -> Iterator[tuple[Phase, int]]:
        """Samples of each phase between two points of the run."""
        for phase in self.phases.all:
            last = end if phase.end is None else min(end, phase.end)
            yield phase, max(0, last - max(begin, phase.begin))
