"""What goes wrong in a run, where and when: written by a test, read by the process that it happens to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PLAN_VARIABLE = "FAULT_PLAN"
MARK_VARIABLE = "FAULT_JOB"
"""Of one job and all that it starts: nothing with this mark may outlive it."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. What is None does not matter."""

    at: str
    """A name of ``points.POINTS``."""
    act: str
    """A name of ``acts.ACTS``."""
    rank: int | None = None
    step: int | None = None
    """Steps done when the point is reached."""
    until: int | None = None
    """Every step from ``step`` up to and without this one; else that step only."""
    call: int | None = None
    """How often this process has been at the point before."""
    after: bool = False
    """When the real function has returned, not before it is called."""
    with_: dict[str, Any] = field(default_factory=dict)
    """Arguments of the act."""

    def strikes(self, *, rank: int, step: int | None, call: int) -> bool:
        """Whether it is time."""
        if self.rank not in (None, rank) or self.call not in (None, call):
            return False
        if self.step is None:
            return True
        return step is not None and self.step <= step < (self.step + 1 if self.until is None else self.until)


def encode(faults: Sequence[Fault]) -> str:
    """For the environment."""
    return json.dumps([asdict(fault) for fault in faults])


def decode(text: str) -> list[Fault]:
    """The inverse of ``encode``."""
    return [Fault(**fields) for fields in json.loads(text)]
