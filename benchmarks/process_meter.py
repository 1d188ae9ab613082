"""What a process and those below it have used, from Linux's /proc: processor time, memory, bytes read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PARENT, _USER_TICKS, _SYSTEM_TICKS = 1, 11, 12
"""Fields of /proc/PID/stat after the command's name."""


class Usage(NamedTuple):
    """Sums over processes."""

    cpu_s: float
    bytes_read: int
    """Through read calls: of files, pipes and sockets."""
    minor_faults: int


class Memory(NamedTuple):
    """Of several processes together; what they share counts once in ``pss_mb`` and in each for ``rss_mb``."""

    pss_mb: float
    rss_mb: float


def process_tree(root: int) -> list[int]:
    """A process and all that it started, however deep, also in sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[_PARENT]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is read
        found += children.get(pid, [])
    return found


def usage(processes: list[int]) -> Usage:
    """Processor time and bytes read since the processes began."""
    ticks = read = faults = 0
    for pid in processes:
        fields = _stat(pid)
        if fields:
            ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
            faults += int(fields[7])
            read += _value(Path(f"/proc/{pid}/io"), "rchar:")
    return Usage(ticks * _TICK_S, read, faults)


def memory(processes: list[int]) -> Memory:
    """Resident memory now."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup") for pid in processes]
    pss, rss = (sum(_value(path, name) for path in rollups) / 1e3 for name in ("Pss:", "Rss:"))
    return Memory(round(pss), round(rss))


def _stat(pid: int) -> list[str]:
    """Fields after the command's name; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _value(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
