"""Spreads the tensors of a checkpoint over the ranks that write it: pure arithmetic, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

BYTES_PER_WRITER = 512 * 2**20
"""A second's work for one disk. Fewer, larger files are kinder to a shared file system than one per rank."""


def choose_writers(num_bytes: int, *, world_size: int, bytes_per_writer: int = BYTES_PER_WRITER) -> list[int]:
    """Ranks that write: rank 0 and others, evenly spaced so that they lie on different nodes."""
    count = max(1, min(world_size, -(-num_bytes // bytes_per_writer)))
    return [place * world_size // count for place in range(count)]


def spread(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Names in ``count`` lists of about equal total size: the largest first, each to the list with the least."""
    lists: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, place) for place in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, place = heapq.heappop(loads)
        lists[place].append(name)
        heapq.heappush(loads, (load + sizes[name], place))
    return lists


def part_name(kind: str, place: int, count: int) -> str:
    """File name of one part; without a number where there is one only."""
    return f"{kind}.safetensors" if count == 1 else f"{kind}-{place:05d}-of-{count:05d}.safetensors"


def parts_of(kind: str, names: Sequence[str]) -> list[str]:
    """Those of a checkpoint's files that are parts of a kind, in order."""
    return sorted(
        name
        for name in names
        if name == f"{kind}.safetensors" or (name.startswith(f"{kind}-") and name.endswith(".safetensors"))
    )
