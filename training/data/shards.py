"""Turns what a user writes after ``--train-data`` into a list of shards with weights and a number of samples.

"a/{000..009}.tar::pipe:aws s3 cp s3://b/{00..99}.tar -"   2 sources, 110 shards
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import braceexpand
import fsspec

PIPE_PREFIX = "pipe:"
_GLOB_CHARACTERS = frozenset("*?[")
_EXISTENCE_CHECKS = 1000


@dataclass(frozen=True)
class ShardList:
    """Shard URLs in a fixed order, and the relative frequency with which each is drawn when resampling."""

    urls: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def digest(self) -> str:
        """sha256 over URLs and weights: two runs with the same digest read the same stream."""
        text = json.dumps([self.urls, self.weights])
        return hashlib.sha256(text.encode()).hexdigest()


def expand_shards(pattern: str, *, upsampling_factors: str | None = None, flag: str = "--train-data") -> ShardList:
    """Expands sources (``::``), braces and local globs; a factor is the weight of every shard of its source.

    Raises:
        ValueError: a pattern matches nothing, a local shard does not exist, or factors and sources differ in number.
    """
    sources = [source for source in pattern.split("::") if source]
    factors = [float(factor) for factor in (upsampling_factors or "::".join("1" * len(sources))).split("::")]
    if len(factors) != len(sources):
        raise ValueError(
            f"{len(factors)} upsampling factors for {len(sources)} sources: give one factor per '::'-joined source of "
            f"{flag} in --train-data-upsampling-factors."
        )
    urls: list[str] = []
    weights: list[float] = []
    for source, factor in zip(sources, factors, strict=True):
        expanded = _expand_source(source, flag=flag)
        urls += expanded
        weights += [factor] * len(expanded)
    _check_local_shards(urls, flag=flag)
    return ShardList(tuple(urls), tuple(weights))


def _expand_source(source: str, *, flag: str) -> list[str]:
    urls = list(braceexpand.braceexpand(source))
    if source.startswith(PIPE_PREFIX):
        return urls
    expanded: list[str] = []
    for url in urls:
        if is_local(url) and _GLOB_CHARACTERS & set(url):
            matches = sorted(glob.glob(url))
            if not matches:
                raise ValueError(f"No shard matches {url!r}: correct the path given to {flag}.")
            expanded += matches
        elif is_local(url) and os.path.isdir(url):
            matches = sorted(glob.glob(os.path.join(glob.escape(url), "*.tar")))
            if not matches:
                raise ValueError(f"Directory {url!r} holds no .tar file: give its shards or its parent to {flag}.")
            expanded += matches
        else:
            expanded.append(url)
    return expanded


def _check_local_shards(urls: Sequence[str], *, flag: str) -> None:
    """Missing files end the run now, not in the middle of an epoch; of very long lists only a sample is looked at."""
    local = [url for url in urls if is_local(url)]
    stride = max(1, len(local) // _EXISTENCE_CHECKS)
    missing = [url for url in local[::stride] if not os.path.exists(url)]
    if missing:
        raise ValueError(f"{len(missing)} of {len(urls)} shards do not exist, first {missing[0]!r}: correct {flag}.")


def is_local(url: str) -> bool:
    """True for a path on a file system of this machine (not ``pipe:``, ``s3://`` and the like)."""
    return not url.startswith(PIPE_PREFIX) and "://" not in url


def count_samples(shards: ShardList) -> int | None:
    """Sum of the shards' sizes in the ``sizes.json`` (or ``__len__``) beside them; None where a count is missing."""
    by_directory: dict[str, list[str]] = {}
    for url in shards.urls:
        if url.startswith(PIPE_PREFIX):
            return None
        by_directory.setdefault(url.rpartition("/")[0] or ".", []).append(url)
    total = 0
    for directory, urls in by_directory.items():
        count = _count_in_directory(directory, urls)
        if count is None:
            return None
        total += count
    return total


def _count_in_directory(directory: str, urls: Sequence[str]) -> int | None:
    sizes_text = _read_text(f"{directory}/sizes.json")
    if sizes_text is not None:
        sizes = json.loads(sizes_text)
        counts = [sizes.get(url.rpartition("/")[2]) for url in urls]
        return None if None in counts else sum(int(count) for count in counts)
    length_text = _read_text(f"{directory}/__len__")
    return None if length_text is None else int(length_text)


def _read_text(url: str) -> str | None:
    try:
        with fsspec.open(url, "rt") as file:
            return str(file.read())
    except FileNotFoundError:
        return None


def require_num_samples(num_samples: int | None, shards: ShardList, *, flag: str) -> int:
    """The number of samples in an epoch: as given by ``flag``, else counted from the files beside the shards."""
    count = num_samples if num_samples is not None else count_samples(shards)
    if count is None or count <= 0:
        raise ValueError(
            f"The number of samples in {len(shards.urls)} shards is unknown (no complete sizes.json beside "
            f"{shards.urls[0]!r}): pass {flag}."
        )
    return count
