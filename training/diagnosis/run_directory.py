"""Writes into the run directory as a checkpoint is written, reads it back, and looks whether other nodes see it.

RUN/.doctor-TOKEN/NODE     one file from each node; TOKEN is new for every examination
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path

from training.diagnosis.findings import Finding, Rate, bad, ok, warning

_CHECK = "run directory"
_BYTES = 8 << 20
_FREE_GIB = 10.0
_SLOW_MB_S = 20.0
_PATIENCE_S = 5.0
"""A network file system may show another node's file only after a while."""
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


class RunDirectory:
    """The directory as one node sees it."""

    def __init__(self, path: Path, *, token: str, node: str) -> None:
        """
        Args:
            token: the same on all nodes.
        """
        self._path = path
        self._probes = path / f".doctor-{token}"
        self._token = token
        self._node = node

    def write_and_read(self) -> tuple[list[Finding], list[Rate]]:
        """A file of 8 MiB that is flushed to the disk, and read from there."""
        data = random.Random(self._token + self._node).randbytes(_BYTES)
        probe = self._probes / self._node
        try:
            self._probes.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            with probe.open("wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
                seconds = time.perf_counter() - start
                # Otherwise what is read comes from this node's memory.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            same = probe.read_bytes() == data
            space = os.statvfs(self._path)
        except OSError as error:
            remedy = "make it writable, free the disk or the quota, or pass another directory"
            return [bad(_CHECK, f"{self._path} cannot be written ({error.strerror}): {remedy}", shared=True)], []
        if not same:
            return [bad(_CHECK, f"what was written to {self._path} is not what is read from it")], []
        free_gib = space.f_bavail * space.f_frsize / 2**30
        speed = _BYTES / 1e6 / seconds
        text = f"{self._path} ({file_system_of(self._path)}): {speed:.0f} MB/s with fsync, {free_gib:.0f} GiB free"
        kind = f"run directory, {file_system_of(self._path)}"
        rates = [Rate("run directory", speed, "MB/s", kind)]
        if free_gib < _FREE_GIB:
            return [warning(_CHECK, f"{text}: less than {_FREE_GIB:g} GiB may not hold two checkpoints")], rates
        if speed < _SLOW_MB_S:
            return [warning(_CHECK, f"{text}: checkpoints will take long")], rates
        return [ok(_CHECK, text)], rates

    def look_for(self, nodes: Iterable[str]) -> dict[str, bool]:
        """Whether the files of other nodes, all written by now, can be read here."""
        deadline = time.monotonic() + _PATIENCE_S
        seen = {}
        for node in nodes:
            while not (found := self._is_whole(node)) and time.monotonic() < deadline:
                time.sleep(0.1)
            seen[node] = found
        return seen

    def clean_up(self) -> None:
        """Removes this node's file, and the directory when it is the last."""
        with contextlib.suppress(OSError):
            (self._probes / self._node).unlink(missing_ok=True)
            self._probes.rmdir()

    def _is_whole(self, node: str) -> bool:
        try:
            with (self._probes / node).open("rb") as file:
                return file.read(4096) == random.Random(self._token + node).randbytes(_BYTES)[:4096]
        except OSError:
            return False


def file_system_of(path: Path, *, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that holds a path: ``lustre``, ``nfs4``, ``tmpfs``; empty where it is not told."""
    place, best, found = path.resolve(), "", ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mounted, kind, *_ = line.split(" ")
        if place.is_relative_to(mounted.replace("\\040", " ")) and len(mounted) >= len(best):
            best, found = mounted, kind
    return found


def neighbours(node: str, nodes: list[str], *, count: int = 8) -> list[str]:
    """Whose files a node looks for: the first node's and those of the next ones, not of all hundred."""
    place = nodes.index(node)
    ring = nodes[place + 1 :] + nodes[:place]
    return [other for other in dict.fromkeys([*nodes[:1], *ring[:count]]) if other != node]
