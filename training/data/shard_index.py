"""Counts and locates the samples of shards: sizes.json beside them, and byte offsets in SHARD.idx.

000.tar   000.tar.idx (.npy: little-endian uint64, the byte where each sample begins)   sizes.json {"000.tar": 5000}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.shards import is_local, storage_location
from training.data.storage import StorageError, open_shard
from training.data.tar_reader import TarError, read_samples

INDEX_SUFFIX = ".idx"


class ShardIndex(NamedTuple):
    """Where the samples of one shard begin; ``damage`` says why it could not be read to its end, if so."""

    url: str
    offsets: npt.NDArray[np.uint64]
    damage: str | None


def index_shards(urls: Sequence[str], *, workers: int) -> Iterator[ShardIndex]:
    """Reads every shard from end to end, ``workers`` at a time, and yields them in order."""
    with ThreadPoolExecutor(workers) as threads:
        yield from threads.map(index_shard, urls)


def index_shard(url: str) -> ShardIndex:
    """Reads one shard strictly; damage is reported, not raised."""
    offsets: list[int] = []
    damage: str | None = None
    try:
        with open_shard(url) as stream:
            offsets += (sample.offset for sample in read_samples(stream))
    except (TarError, StorageError) as error:
        damage = str(error)
    return ShardIndex(url, np.array(offsets, dtype="<u8"), damage)


def index_places(urls: Sequence[str], out: str | None) -> list[Path]:
    """The .idx file of every shard, all different: beside it, or in ``out``.

    Raises:
        ValueError: a shard is not local and there is no ``out``, or two shards would share a file there.
    """
    places: dict[Path, str] = {}
    for url in urls:
        if out is None and not is_local(url):
            raise ValueError(f"{url!r} is not a local file: pass --out DIR for its index and sizes.json.")
        location = storage_location(url) or url
        name = location.rpartition("/")[2].strip(" -")
        place = Path(location + INDEX_SUFFIX) if out is None else Path(out) / (name + INDEX_SUFFIX)
        if places.setdefault(place, url) != url:
            raise ValueError(f"{places[place]!r} and {url!r} would share {place}: index them into different --out.")
    return list(places)


def write_index(index: ShardIndex, place: Path) -> None:
    """Writes one .idx file, whole or not at all."""
    partial = place.with_name(place.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, index.offsets)
    partial.replace(place)


def update_sizes(directory: Path, counts: dict[str, int | None]) -> None:
    """Sets the counts in a directory's sizes.json; None removes a shard's, others stay as they are.

    Raises:
        ValueError: the file there is no JSON object.
    """
    path = directory / "sizes.json"
    sizes: object = {}
    if path.exists():
        try:
            sizes = json.loads(path.read_text())
        except ValueError:
            sizes = None
    if not isinstance(sizes, dict):
        raise ValueError(f"{path} is no JSON object: remove it, it is written anew then.")
    sizes.update(counts)
    known = {name: sizes[name] for name in sorted(sizes) if sizes[name] is not None}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(known, indent=0) + "\n")
    partial.replace(path)
