"""Reads and writes SLURM's lists of host names: ``jwb[0001-0003,0007],login1``.

What stands in brackets is a list of numbers and ranges; leading zeros are kept. A name may have several brackets:
``rack[1-2]node[01-02]`` is rack1node01, rack1node02, rack2node01, rack2node02.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_LARGEST_RANGE = 65_536
"""Names in one range; SLURM's own limit (MAX_RANGE)."""
_PIECE = re.compile(r"([^\[\],\s]*)(?:\[([^\[\]]*)\])?")
_NUMBERED = re.compile(r"(.*?)(\d+)")


def expand(node_list: str) -> list[str]:
    """The names, in the order in which they are listed: ``n[3,1]`` is n3, n1. Pure.

    Raises:
        ValueError: no list of SLURM's.
    """
    return [name for item in _split(node_list) for name in _expand_item(item, node_list)]


def compress(names: Iterable[str]) -> str:
    """The shortest list that ``expand`` reads back as these names, sorted, each once. Pure.

    Raises:
        ValueError: a name that cannot stand in a list.
    """
    groups: dict[str, list[str]] = {}
    for name in set(names):
        if not name or re.search(r"[\[\],\s]", name):
            raise ValueError(f"{name!r} is not a host name: it is empty, or has a bracket, a comma or a space")
        match = _NUMBERED.fullmatch(name)
        prefix, number = match.groups() if match else (name, "")
        groups.setdefault(prefix, []).append(number)
    return ",".join(_compress_group(prefix, numbers) for prefix, numbers in sorted(groups.items()))


def _split(node_list: str) -> list[str]:
    """At the commas outside of brackets; SLURM overlooks empty items, and so do we."""
    items, depth, start = [], 0, 0
    for position, character in enumerate(node_list):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"node list {node_list!r}: '{character}' at character {position + 1} has no counterpart")
        if character == "," and depth == 0:
            items.append(node_list[start:position])
            start = position + 1
    if depth:
        raise ValueError(f"node list {node_list!r}: a '[' is not closed; was the list cut off?")
    return [item.strip() for item in [*items, node_list[start:]] if item.strip()]


def _expand_item(item: str, node_list: str) -> list[str]:
    parts: list[list[str]] = []
    position = 0
    while position < len(item):
        piece = _PIECE.match(item, position)
        if piece is None or piece.end() == position:
            raise ValueError(f"node list {node_list!r}: a space within the name {item!r}")
        text, numbers = piece.groups()
        parts.append([text])
        if numbers is not None:
            parts.append([number for part in numbers.split(",") for number in _expand_range(part, node_list)])
        position = piece.end()
    return ["".join(choice) for choice in itertools.product(*parts)]


def _expand_range(part: str, node_list: str) -> list[str]:
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
    if match is None:
        raise ValueError(f"node list {node_list!r}: {part!r} in brackets is neither a number nor a range such as 01-16")
    first, last = match[1], match[2] or match[1]
    count = int(last) - int(first) + 1
    if count < 1:
        raise ValueError(f"node list {node_list!r}: the range {part} runs backwards")
    if count > _LARGEST_RANGE:
        raise ValueError(f"node list {node_list!r}: {count} names in {part}, SLURM's largest range is {_LARGEST_RANGE}")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _compress_group(prefix: str, numbers: list[str]) -> str:
    """One item for the numbers of one prefix; the empty number is the bare name."""
    bare = [prefix] if "" in numbers else []
    ranges: list[tuple[str, str]] = []
    # Padded numbers apart: 7 and 07 are different names.
    for number in sorted((number for number in numbers if number), key=lambda text: (len(text), int(text))):
        if ranges and number == f"{int(ranges[-1][1]) + 1:0{len(ranges[-1][0])}d}":
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    texts = [first if first == last else f"{first}-{last}" for first, last in ranges]
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return ",".join([*bare, prefix + texts[0]])
    return ",".join([*bare, f"{prefix}[{','.join(texts)}]"] if texts else bare)
