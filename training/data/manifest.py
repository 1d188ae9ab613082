"""Reads --train-data-manifest: many sources in one file, each with a weight that may follow a schedule.

    weights: per-shard                    # or share
    sources:
      - name: laion
        shards: "s3://b/laion/{000000..231349}.tar"
        weight: [[0, 1.0], [8, 0.2]]      # epoch, weight: linear between the points, constant before and after
        num_samples: 2_000_000_000
      - {name: cc12m, shards: ["cc12m/{0000..1242}.tar"], weight: 3}

Pure except for reading the file, the shards' counts beside them, and looking up local shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data.shards import (
    ShardList,
    ShardSource,
    count_samples,
    expand_shards,
    is_local,
    read_text,
)

FLAG = "--train-data-manifest"
PER_SHARD = "per-shard"
SHARE = "share"
_TOP_FIELDS = frozenset({"weights", "sources"})
_SOURCE_FIELDS = frozenset({"name", "shards", "weight", "num_samples"})
_STEPS_PER_EPOCH = 1000

Schedule = tuple[tuple[float, float], ...]
"""(epoch, weight) points, in order of the epoch."""


class WeightSchedule:
    """Which shard is drawn at a point of the training: a pure function, small to pickle.

    Args:
        sources: the runs of shards that are drawn from.
        schedules: for each source, how likely every single one of its shards is, up to a common factor.
    """

    def __init__(self, sources: Sequence[ShardSource], schedules: Sequence[Schedule]) -> None:
        self._firsts = np.array([source.first for source in sources], dtype=np.int64)
        self._counts = np.array([source.num_shards for source in sources], dtype=np.int64)
        epochs = sorted({epoch for points in schedules for epoch, _ in points})
        epochs.append(epochs[-1] + 1)  # two points at least, so that there is an interval to look in
        self._epochs = np.array(epochs, dtype=np.float64)
        # [K, S]: on the points of all sources together, so that one interpolation serves them all
        self._weights = np.stack([_interpolate(points, self._epochs) for points in schedules], axis=1) * self._counts
        self.is_constant = bool((self._weights == self._weights[0]).all())
        self._latest: tuple[int, npt.NDArray[np.float64]] | None = None

    def cumulative(self, progress: float) -> npt.NDArray[np.float64]:
        """[S]: cumulative probabilities of the sources after ``progress`` epochs, in steps of 1/1000 epoch."""
        step = 0 if self.is_constant else math.floor(progress * _STEPS_PER_EPOCH)
        if self._latest is None or self._latest[0] != step:
            sums = np.cumsum(self._weights_at(step / _STEPS_PER_EPOCH))
            self._latest = (step, sums / sums[-1])
        return self._latest[1]

    def _weights_at(self, epoch: float) -> npt.NDArray[np.float64]:
        right = min(max(int(np.searchsorted(self._epochs, epoch)), 1), len(self._epochs) - 1)
        before, after = self._epochs[right - 1], self._epochs[right]
        part = min(max((epoch - before) / (after - before), 0.0), 1.0)
        weights: npt.NDArray[np.float64] = (1 - part) * self._weights[right - 1] + part * self._weights[right]
        return weights

    def draw(self, uniform: float, progress: float) -> int:
        """The index of the shard that a number in [0, 1) picks: first its source, then, with the rest, the shard."""
        cumulative = self.cumulative(progress)
        # A 64-bit draw may round to 1.0: the last source that can be drawn has it then.
        uniform = min(uniform, np.nextafter(cumulative[-1], 0.0))
        source = int(np.searchsorted(cumulative, uniform, side="right"))
        start = cumulative[source - 1] if source else 0.0
        count = int(self._counts[source])
        place = int((uniform - start) / (cumulative[source] - start) * count)
        return int(self._firsts[source]) + min(place, count - 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}


@dataclass(frozen=True, eq=False)
class Manifest:
    """The sources of a manifest. ``shards.weights`` are those at the beginning; ``schedule`` has them all."""

    shards: ShardList
    schedule: WeightSchedule
    digest: str
    """sha256 over shards, names, weights and their schedule: the same digest, the same stream."""
    weighting: str
    """The same without the places of the shards."""
    given_counts: tuple[int | None, ...]
    """The sources' ``num_samples``, as far as the manifest gives them."""

    @cached_property
    def num_samples(self) -> int | None:
        """Samples of all sources together; what the manifest does not give is read beside the shards now, if there."""
        total = 0
        for source, given in zip(self.shards.sources, self.given_counts, strict=True):
            count = given if given is not None else count_samples(self.shards.part(source))
            if count is None:
                return None
            total += count
        return total

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names, in the order of the file."""
        return tuple(source.name for source in self.shards.sources)

    @property
    def needs_resampling(self) -> bool:
        """True unless all shards are equally likely at all times, which is what epochs without repetition are."""
        return not self.schedule.is_constant or len(set(self.shards.weights)) > 1


def read_manifest(path: str) -> Manifest:
    """Reads a YAML or JSON manifest, local or remote; local shard patterns are relative to the manifest's directory.

    Raises:
        ValueError: the file is missing or no manifest; the message names file, source and field.
    """
    text = read_text(path)
    if text is None:
        raise ValueError(f"Manifest {path!r} does not exist: correct {FLAG}.")
    entries, meaning = _parse(text, path)
    lists = [_expand(entry, path) for entry in entries]
    counts = [_given_count(entry, path) for entry in entries]
    if meaning == SHARE:
        pairs = zip(counts, lists, strict=True)
        counts = [count_samples(shards) if count is None else count for count, shards in pairs]
    firsts = itertools.accumulate((len(shards.urls) for shards in lists[:-1]), initial=0)
    sources = tuple(
        ShardSource(entry["name"], first, len(shards.urls))
        for entry, first, shards in zip(entries, firsts, lists, strict=True)
    )
    weights = [_parse_schedule(entry, path) for entry in entries]
    schedules = [
        _per_shard(points, count, source, meaning=meaning, path=path)
        for points, count, source in zip(weights, counts, sources, strict=True)
    ]
    _check_sums(schedules, path)
    schedule = WeightSchedule(sources, schedules)
    shards = ShardList(
        urls=tuple(itertools.chain.from_iterable(shards.urls for shards in lists)),
        weights=tuple(
            points[0][1] for points, source in zip(schedules, sources, strict=True) for _ in range(source.num_shards)
        ),
        sources=sources,
    )
    return Manifest(
        shards=shards,
        schedule=schedule,
        given_counts=tuple(counts),
        digest=_digest([shards.urls, sources, schedules]),
        weighting=_digest([sources, schedules]),
    )


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse(text: str, path: str) -> tuple[list[dict[str, Any]], str]:
    import yaml  # only here: loader workers import this module for the schedule

    try:
        # JSON is YAML, except for tabs.
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"Manifest {path!r} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise ValueError(f"Manifest {path!r} has no list of 'sources' at its top level.")
    _check_fields(content, _TOP_FIELDS, f"Manifest {path!r}")
    meaning = content.get("weights", PER_SHARD)
    if meaning not in (PER_SHARD, SHARE):
        raise ValueError(f"Manifest {path!r}: 'weights' is {meaning!r}, must be {PER_SHARD!r} or {SHARE!r}.")
    entries = content["sources"]
    names: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
            raise ValueError(f"Manifest {path!r}: source number {number} has no 'name'.")
        _check_fields(entry, _SOURCE_FIELDS, _where(entry, path))
        if entry["name"] in names:
            raise ValueError(f"{_where(entry, path)}: another source has that 'name' too.")
        names.add(entry["name"])
    return entries, meaning


def _where(entry: dict[str, Any], path: str) -> str:
    return f"Manifest {path!r}, source {entry['name']!r}"


def _check_fields(content: dict[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(str(field) for field in content if field not in known)
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}, known are {', '.join(sorted(known))}.")


def _expand(entry: dict[str, Any], path: str) -> ShardList:
    patterns = entry.get("shards")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{_where(entry, path)}: 'shards' must be a pattern or a list of patterns.")
    parts = [part for pattern in patterns for part in pattern.split("::")]
    try:
        return expand_shards("::".join(_resolve(part, path) for part in parts), flag="'shards'")
    except ValueError as error:
        raise ValueError(f"{_where(entry, path)}: {error}") from error


def _resolve(pattern: str, path: str) -> str:
    if not is_local(pattern) or os.path.isabs(pattern):
        return pattern
    directory = path.rpartition("/")[0]
    return f"{directory}/{pattern}" if directory else pattern


def _given_count(entry: dict[str, Any], path: str) -> int | None:
    given = entry.get("num_samples")
    count = _number(given)
    if given is not None and (count is None or count < 1 or count != int(count)):
        raise ValueError(f"{_where(entry, path)}: 'num_samples' is {given!r}, must be a whole number above 0.")
    return None if count is None else int(count)


def _parse_schedule(entry: dict[str, Any], path: str) -> Schedule:
    given = entry.get("weight", 1.0)
    points = given if isinstance(given, list) else [[0, given]]
    schedule: list[tuple[float, float]] = []
    for point in points:
        epoch, weight = map(_number, point) if isinstance(point, list) and len(point) == 2 else (None, None)
        rising = epoch is not None and (not schedule or schedule[-1][0] < epoch)
        if epoch is None or weight is None or weight < 0 or not rising:
            break
        schedule.append((epoch, weight))
    if not schedule or len(schedule) < len(points):
        raise ValueError(
            f"{_where(entry, path)}: 'weight' is {given!r}, must be a number, or [epoch, weight] points with rising "
            "epochs; weights are not negative."
        )
    return tuple(schedule)


def _number(value: object) -> float | None:
    """A finite number; YAML 1.1 reads ``2e9`` as text, so text is looked at too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _per_shard(points: Schedule, count: int | None, source: ShardSource, *, meaning: str, path: str) -> Schedule:
    """How likely each of the source's shards is, up to a factor common to all sources."""
    if meaning == PER_SHARD:
        return points
    if not count:
        raise ValueError(
            f"Manifest {path!r}, source {source.name!r}: 'weights: share' needs its number of samples, and there is no "
            "complete sizes.json beside its shards: give 'num_samples'."
        )
    # A draw gives a whole shard, count / num_shards samples, and the source has num_shards chances.
    return tuple((epoch, weight / count) for epoch, weight in points)


def _check_sums(schedules: Sequence[Schedule], path: str) -> None:
    epochs = sorted({epoch for points in schedules for epoch, _ in points})
    sums = sum(_interpolate(points, np.array(epochs)) for points in schedules)
    for epoch, total in zip(epochs, np.atleast_1d(sums), strict=True):
        if not total > 0:
            raise ValueError(f"Manifest {path!r}: the weights of all sources are 0 at epoch {epoch:g}.")


def _interpolate(points: Schedule, epochs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known, weights = zip(*points, strict=True)
    return np.asarray(np.interp(epochs, known, weights), dtype=np.float64)
