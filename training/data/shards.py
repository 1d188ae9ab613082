"""Turns what a user writes after ``--train-data`` into a list of shards with weights and a number of samples.

"a/{000..009}.tar::pipe:aws s3 cp s3://b/{00..99}.tar -"   2 sources, 110 shards
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import braceexpand
import numpy as np
import numpy.typing as npt

from training.data.aws_command import parse_s3_copy
from training.data.storage_errors import ShardMissing, StorageError

logger = logging.getLogger(__name__)

PIPE_PREFIX = "pipe:"
_GLOB_CHARACTERS = frozenset("*?[")
_EXISTENCE_CHECKS = 1000
_REMOTE_URL = re.compile(r"(?<!--endpoint-url )(?<!--endpoint-url=)\b(?:s3|gs|https?)://[^\s'\"|<>;]+")


class ShardSource(NamedTuple):
    """One ``::``-joined part of a shard pattern, or one entry of a manifest: a run of neighbours in the shard list."""

    name: str
    first: int
    num_shards: int


@dataclass(frozen=True)
class ShardList:
    """Shard URLs in a fixed order, and the relative frequency with which each is drawn when resampling."""

    urls: tuple[str, ...]
    weights: tuple[float, ...]
    sources: tuple[ShardSource, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over URLs and weights: two runs with the same digest read the same stream."""
        text = json.dumps([self.urls, self.weights])
        return hashlib.sha256(text.encode()).hexdigest()

    def part(self, source: ShardSource) -> ShardList:
        """The shards of one source alone."""
        places = slice(source.first, source.first + source.num_shards)
        return ShardList(self.urls[places], self.weights[places], (ShardSource(source.name, 0, source.num_shards),))

    @property
    def source_of_shard(self) -> npt.NDArray[np.int32]:
        """[number of shards]: the index in ``sources`` that each shard belongs to."""
        indices = np.arange(len(self.sources), dtype=np.int32)
        return np.repeat(indices, [source.num_shards for source in self.sources])


def expand_shards(pattern: str, *, upsampling_factors: str | None = None, flag: str = "--train-data") -> ShardList:
    """Expands sources (``::``), braces and local globs; a factor is the weight of every shard of its source.

    Raises:
        ValueError: a pattern matches nothing, a local shard does not exist, or factors and sources differ in number.
    """
    patterns = [source for source in pattern.split("::") if source]
    factors = _parse_factors(upsampling_factors, len(patterns), flag=flag)
    urls: list[str] = []
    weights: list[float] = []
    sources: list[ShardSource] = []
    for source, factor in zip(patterns, factors, strict=True):
        expanded = _expand_source(source, flag=flag)
        sources.append(ShardSource(source, len(urls), len(expanded)))
        urls += expanded
        weights += [factor] * len(expanded)
    if not urls:
        raise ValueError(f"{pattern!r} names no shards: correct {flag}.")
    _check_local_shards(urls, flag=flag)
    return ShardList(tuple(urls), tuple(weights), tuple(sources))


def _parse_factors(text: str | None, num_sources: int, *, flag: str) -> list[float]:
    if text is None:
        return [1.0] * num_sources
    try:
        factors = [float(factor) for factor in text.split("::")]
    except ValueError:
        raise ValueError(f"--train-data-upsampling-factors {text!r} are not numbers joined by '::'.") from None
    if len(factors) != num_sources:
        raise ValueError(
            f"{len(factors)} upsampling factors for {num_sources} sources: give one factor per '::'-joined source of "
            f"{flag} in --train-data-upsampling-factors."
        )
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or sum(factors) <= 0:
        raise ValueError(f"--train-data-upsampling-factors {text!r}: give finite factors, none negative, not all 0.")
    return factors


def _expand_source(source: str, *, flag: str) -> list[str]:
    try:
        urls = list(braceexpand.braceexpand(source))
    except ValueError as error:  # an unbalanced brace
        raise ValueError(f"Pattern {source!r} cannot be expanded ({error}): correct {flag}.") from error
    # 200,000 shards are expanded at every start: no work per URL, and no stat on a shared file system, where the
    # source as a whole shows that there is nothing to look up.
    if not is_local(source) or (source.endswith(".tar") and not _GLOB_CHARACTERS.intersection(source)):
        return urls
    expanded: list[str] = []
    for url in urls:
        if _GLOB_CHARACTERS.intersection(url):
            matches = sorted(glob.glob(url))
            if not matches:
                raise ValueError(f"No shard matches {url!r}: correct the path given to {flag}.")
            expanded += matches
        elif os.path.isdir(url):
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


def storage_location(url: str) -> str | None:
    """Where the shard lies: the URL itself, or the only remote URL in a ``pipe:`` command; None if that is unclear."""
    if not url.startswith(PIPE_PREFIX):
        return url
    named = _REMOTE_URL.findall(url)
    return str(named[0]) if len(named) == 1 else None


def count_samples(shards: ShardList) -> int | None:
    """Sum of the shards' sizes in the ``sizes.json`` (or ``__len__``) beside them; None where a count is missing.

    Raises:
        ValueError: one of these files is broken.
    """
    by_directory: dict[str, list[str]] = {}
    first_urls: dict[str, str] = {}
    for url in shards.urls:
        location = storage_location(url)
        if location is None:
            return None
        directory, _, name = location.rpartition("/")
        by_directory.setdefault(directory or ".", []).append(name)
        first_urls.setdefault(directory or ".", url)
    total = 0
    for directory, names in by_directory.items():
        count = _count_in_directory(directory, names, first_urls[directory])
        if count is None:
            return None
        total += count
    return total


def _count_in_directory(directory: str, names: Sequence[str], shard_url: str) -> int | None:
    sizes_url = _beside(shard_url, f"{directory}/sizes.json")
    length_url = _beside(shard_url, f"{directory}/__len__")
    try:
        text = read_text(sizes_url)
        if text is not None:
            return _sum_sizes(sizes_url, text, names)
        text = read_text(length_url)
    except StorageError as error:
        # S3 answers 403 for a file that is not there to whoever may not list; and the shards themselves will tell.
        logger.warning("The number of samples beside %r could not be read: %s", shard_url, error)
        return None
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{length_url!r} holds no number ({text[:40]!r}): correct or remove it.") from None


def _beside(shard_url: str, location: str) -> str:
    """How to read ``location``: as the shard, with its endpoint and profile, if that is an ``aws s3 cp``."""
    if shard_url.startswith(PIPE_PREFIX) and parse_s3_copy(shard_url.removeprefix(PIPE_PREFIX)) is not None:
        return shard_url.replace(str(storage_location(shard_url)), location)
    return location


def _sum_sizes(url: str, text: str, names: Sequence[str]) -> int | None:
    try:
        sizes = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{url!r} is not JSON ({error}): correct or remove it.") from None
    if not isinstance(sizes, dict):
        raise ValueError(f"{url!r} is no object of shard names and sample counts: correct or remove it.")
    try:
        counts: list[int] = [sizes[name] for name in names]
    except KeyError:
        return None
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        bad = next(name for name in names if not (isinstance(sizes[name], int) and sizes[name] >= 0))
        raise ValueError(f"{url!r} gives {sizes[bad]!r} samples for {bad!r}: correct or remove it.")
    return sum(counts)


def read_text(url: str) -> str | None:
    """A small file, local or remote; None if there is none.

    Raises:
        StorageError: it cannot be read. ValueError: it is not text.
    """
    from training.data.storage import Storage  # storage imports this module

    try:
        return Storage().read_bytes(url).decode("utf-8")
    except ShardMissing:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{url!r} is not UTF-8 text: correct or remove it.") from None


def require_num_samples(num_samples: int | None, shards: ShardList, *, flag: str) -> int:
    """The number of samples in an epoch: as given by ``flag``, else counted from the files beside the shards."""
    count = num_samples if num_samples is not None else count_samples(shards)
    if count is None or count <= 0:
        raise ValueError(
            f"The number of samples in {len(shards.urls)} shards is unknown (no complete sizes.json beside "
            f"{shards.urls[0]!r}): pass {flag}."
        )
    return count
