"""Puts tensors together whose rows lie in several files, and tells whether all rows of all tensors are there.

    model-00000-of-00002.safetensors    visual.proj rows 0 to 383 of 768
    model-00001-of-00002.safetensors    visual.proj rows 384 to 767 of 768

A tensor that lies in one file as a whole is its only piece. Rows are cut along dim 0, so the bytes of a tensor are
those of its pieces one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.checkpoint.manifest import DamagedCheckpoint, FileFacts
from training.checkpoint.tensor_file import (
    Entry,
    bytes_of,
    file_layout,
    map_tensors,
    read_entries,
    write_entries,
)


class Place(NamedTuple):
    """Where a piece lies."""

    path: Path
    entry: Entry


def find_pieces(files: Mapping[Path, Sequence[Entry]]) -> dict[str, list[Place]]:
    """The pieces of every tensor by name, in the order of their rows.

    Raises:
        DamagedCheckpoint: rows that are missing, or there twice; pieces of different tensors under one name.
    """
    places: dict[str, list[Place]] = {}
    for path, entries in files.items():
        for entry in entries:
            places.setdefault(entry.name, []).append(Place(path, entry))
    for name, pieces in places.items():
        pieces.sort(key=lambda place: (place.entry.row, place.entry.shape))
        _check_rows(name, pieces)
    return places


def copy_rows(target: Tensor, source: Tensor, *, target_row: int = 0, source_row: int = 0) -> int:
    """Copies the rows that both hold of one tensor, each from its first row on; returns how many.

    Tensors without dimensions are copied as they are.
    """
    if target.ndim == 0 or source.ndim == 0:
        target.copy_(source)
        return 1
    first = max(target_row, source_row)
    count = min(target_row + len(target), source_row + len(source)) - first
    if count <= 0:
        return 0
    target[first - target_row : first - target_row + count].copy_(source[first - source_row :][:count])
    return count


class WholeTensors(Mapping[str, Tensor]):
    """The tensors of some files by name, on the CPU. Those that lie in pieces are put together when they are asked for.

    They are not kept: hold on to one for as long as it is needed, and no longer.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """
        Raises:
            DamagedCheckpoint: a file is not one of this format, or rows are missing.
        """
        self._places = find_pieces({path: read_entries(path) for path in paths})
        self._mapped: dict[Path, dict[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._places[name]
        if len(pieces) == 1:
            return self._rows(pieces[0])
        whole = torch.empty(pieces[0].entry.full_shape, dtype=pieces[0].entry.dtype)
        for place in pieces:
            copy_rows(whole, self._rows(place), source_row=place.entry.row)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _rows(self, place: Place) -> Tensor:
        if place.path not in self._mapped:
            self._mapped[place.path] = map_tensors(place.path)
        return self._mapped[place.path][place.entry.name]


def join_files(paths: Sequence[Path], target: Path) -> FileFacts:
    """Writes the tensors of some files, each as a whole, into one new file; copies bytes, and holds no tensor.

    Raises:
        DamagedCheckpoint: a file is not one of this format, or rows are missing. OSError: the disk.
    """
    places = find_pieces({path: read_entries(path) for path in paths})
    mapped = {path: map_tensors(path) for path in paths}
    whole = {name: (pieces[0].entry.dtype, pieces[0].entry.full_shape) for name, pieces in places.items()}
    entries = file_layout(whole, {})
    contents = (bytes_of(mapped[place.path][entry.name]) for entry in entries for place in places[entry.name])
    return write_entries(target, entries, contents)


def _check_rows(name: str, pieces: Sequence[Place]) -> None:
    first = pieces[0]
    next_row = 0
    for place in pieces:
        entry = place.entry
        if (entry.dtype, entry.full_shape) != (first.entry.dtype, first.entry.full_shape):
            raise DamagedCheckpoint(
                f"{place.path} has rows of {name!r} as {entry.dtype} {entry.full_shape}, and {first.path} as "
                f"{first.entry.dtype} {first.entry.full_shape}"
            )
        if place is not first and (not entry.shape or entry.row < next_row):
            raise DamagedCheckpoint(f"{place.path} has rows of {name!r} that another file has as well")
        if entry.row > next_row:
            raise DamagedCheckpoint(
                f"{first.path.parent} has no file with rows {next_row} to {entry.row - 1} of {name!r}, which has "
                f"{entry.full_shape[0]}"
            )
        next_row = entry.row + (entry.shape[0] if entry.shape else 0)
    rows = first.entry.full_shape[0] if first.entry.full_shape else 0
    if next_row < rows:
        raise DamagedCheckpoint(
            f"{first.path.parent} has no file with rows {next_row} to {rows - 1} of {name!r}, which has {rows}"
        )
