"""What the examination of a node comes to: findings, rates and facts, as values that travel between nodes as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """How bad a finding is; the worst of a node is its verdict."""

    OK = 0
    UNKNOWN = 1
    """It could not be looked at here. Never a reason to exclude a node."""
    WARNING = 2
    BAD = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    text: str
    shared: bool = False
    """What all nodes use alike (the storage, the credentials): if all of them find it bad, no node is to blame."""


@dataclass(frozen=True)
class Rate:
    """One measured speed, to be compared with the same one elsewhere."""

    check: str
    value: float
    unit: str
    kind: str
    """Only rates of one kind are compared: the name of the device, and what was measured on it."""
    place: str = ""
    """Where on the node: ``GPU 3``."""


@dataclass(frozen=True)
class ClockReading:
    """This node's clock minus that of the node that answers, and how far the number may be off."""

    offset_s: float
    error_s: float
    synchronised: bool | None
    """What the kernel says about the clock; None: it does not say."""


@dataclass(frozen=True)
class RankReport:
    """What one process found."""

    rank: int
    node: str
    leads: bool = True
    """Whether it looked at the node as a whole; the others look at their own device only."""
    findings: tuple[Finding, ...] = ()
    rates: tuple[Rate, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    """What should be the same on all nodes: versions, the number of GPUs."""
    clock: ClockReading | None = None
    seen: dict[str, bool] = field(default_factory=dict)
    """Other nodes, and whether what they wrote into the run directory can be read here."""
    file_system: str = ""
    """Of the run directory."""
    pairs: dict[str, float | None] = field(default_factory=dict)
    """Partner node -> GB/s of an all-reduce between the two; None: it failed."""
    backend: str = ""
    """What the all-reduces were made with."""
    seconds: float = 0.0
    """The examination's duration."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankReport:
        """What ``to_json`` wrote."""
        values: dict[str, Any] = json.loads(text)
        values["findings"] = tuple(
            Finding(**(entry | {"level": Level(entry["level"])})) for entry in values["findings"]
        )
        values["rates"] = tuple(Rate(**entry) for entry in values["rates"])
        values["clock"] = None if values["clock"] is None else ClockReading(**values["clock"])
        return cls(**values)


def ok(check: str, text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Level.OK, text)


def unknown(check: str, text: str) -> Finding:
    """It cannot be told here."""
    return Finding(check, Level.UNKNOWN, text)


def warning(check: str, text: str, *, shared: bool = False) -> Finding:
    """Worth a look, and no reason to leave the node out."""
    return Finding(check, Level.WARNING, text, shared)


def bad(check: str, text: str, *, shared: bool = False) -> Finding:
    """The node must not be trained on."""
    return Finding(check, Level.BAD, text, shared)
