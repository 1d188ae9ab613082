"""The history of a run: one line in ``starts.jsonl`` for every start, written by rank 0.

{"step": 1200, "time": "2026-01-31T12:00:00+00:00", "host": "node7", "job": "4711", "restart": 2, "world_size": 8,
 "batch_size": 256, ..., "resumed_from": ".../step_00001200", "changes": {"lr": [0.0005, 0.0003]}, "parent": null}
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("clipyard", "torch", "timm", "open_clip_torch")


def describe_start(
    *,
    step: int,
    facts: Mapping[str, Any],
    resumed_from: str | None = None,
    changes: Mapping[str, Any] | None = None,
    parent: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """One line of the history.

    Args:
        step: the first that this start takes.
        facts: world size, batch size, data lanes and the like.
        resumed_from: the checkpoint that it goes on from.
        changes: {setting: [in the checkpoint, now]}.
        parent: the other run that this one branched from, at the start that did so.
    """
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "job": environment.get("SLURM_JOB_ID"),
        "restart": int(environment.get("SLURM_RESTART_COUNT") or 0),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        **facts,
        "resumed_from": resumed_from,
        "changes": dict(changes or {}),
        "parent": None if parent is None else dict(parent),
    }


def append_start(path: Path, start: Mapping[str, Any]) -> None:
    """Adds a line, durably; a line that a crash cut does not swallow it."""
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps(start) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_starts(path: Path) -> list[dict[str, Any]]:
    """All starts, oldest first; empty if there is no such file."""
    if not path.exists():
        return []
    starts = []
    for line in path.read_text().splitlines():
        try:
            start = json.loads(line)
        except ValueError:
            continue
        if isinstance(start, dict) and "step" in start:
            starts.append(start)
    return starts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None
