"""The ledger of a run: everything unusual that happened to it, one line each, for ever. Written by rank 0.

    {"step": 1200, "time": "2026-01-31T12:00:00+00:00", "event": "skipped", "reason": "...", ...}

Lines are only ever added. A run that was resumed from an earlier step says so with an event of its own, because what
stands above for later steps happened to a past that no longer counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.observability.sinks import MetricSink

logger = logging.getLogger(__name__)


class EventLog:
    """``events.jsonl``, with a count of each kind of event in the metric sinks (``guard/skipped``)."""

    def __init__(self, path: Path, first_step: int, *, sinks: Sequence[MetricSink] = ()) -> None:
        """
        Args:
            path: of the file; what is in it stays.
            first_step: that this start of the run takes.
            sinks: where the counts go.
        """
        earlier = read_events(path)
        # Unbuffered: what could not be written must not come out later, in the middle of another line.
        self._file = path.open("ab", buffering=0)
        self._sinks = sinks
        self._counts = Counter(str(event.get("event")) for event in earlier)
        self._lost = 0
        # A crash, or a full disk, may have cut the last line: it must not swallow the next.
        self._cut = bool(path.stat().st_size) and not path.read_bytes().endswith(b"\n")
        if any(int(event.get("step", 0)) >= first_step for event in earlier):
            self.write(first_step, "resumed", note="earlier lines with later steps belong to a past that was given up")

    def write(self, step: int, event: str, **details: Any) -> None:
        """Adds one event. A full disk costs the line, not the run; the first time is logged."""
        line = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **details}
        self._counts[event] += 1
        text = json.dumps(_plain(line), allow_nan=False) + "\n"
        try:
            self._append(text.encode())
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                logger.warning("An event could not be written (%s): %s", error, line)
        for sink in self._sinks:
            with contextlib.suppress(OSError):  # a full disk; the line above said so
                sink.write(step, {f"guard/{event}": self._counts[event]})

    def close(self) -> None:
        """Closes the file; says how many events are missing in it."""
        if self._lost:
            logger.warning("%d events could not be written.", self._lost)
        self._file.close()

    def _append(self, line: bytes) -> None:
        line = b"\n" + line if self._cut else line
        written = self._file.write(line) or 0
        if written:
            self._cut = not line[:written].endswith(b"\n")
        if written < len(line):
            raise OSError(f"{written} of {len(line)} bytes written")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; lines that a crash cut are left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
