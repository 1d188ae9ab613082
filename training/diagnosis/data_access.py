"""Reads a little of the first and the last shard, the way and with the credentials that training will."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from training.config import DataConfig
from training.data.build import storage_options
from training.data.epoch import resolve_dataset_type
from training.data.manifest import read_manifest
from training.data.shards import expand_shards
from training.data.storage import Storage, StorageError
from training.diagnosis.findings import Finding, bad, ok, warning

_READ_BYTES = 256 << 10
_TAR_BLOCK = 512
_MAGIC = slice(257, 262)
_SLOW_S = 5.0
_CHECK = "shards"


def read_shards(data: DataConfig) -> list[Finding]:
    """A finding for each of the run's data: what could be read of its ends, and how fast."""
    findings = []
    try:
        for flag, urls in _lists_of_shards(data):
            findings.append(_read_ends(data, urls, flag=flag))
    except (ValueError, OSError, StorageError) as error:
        findings.append(bad(_CHECK, str(error), shared=True))
    return findings


def _lists_of_shards(data: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """(flag, first and last shard or the table itself) of all that the run reads."""
    if data.train_data_manifest is not None:
        yield "--train-data-manifest", _ends(read_manifest(data.train_data_manifest).shards.urls)
    elif data.train_data is not None:
        yield "--train-data", _ends_of(data, data.train_data, flag="--train-data")
    if data.val_data is not None:
        yield "--val-data", _ends_of(data, data.val_data, flag="--val-data")


def _ends_of(data: DataConfig, pattern: str, *, flag: str) -> list[str]:
    if resolve_dataset_type(data, pattern, flag=flag) in ("csv", "jsonl"):
        return [pattern]
    return _ends(expand_shards(pattern, flag=flag).urls)


def _ends(urls: tuple[str, ...]) -> list[str]:
    return [urls[0], *urls[1:][-1:]]


def _read_ends(data: DataConfig, urls: list[str], *, flag: str) -> Finding:
    # Not from the cache, which would hide a storage that is gone; and with less patience than training has.
    options = replace(storage_options(data), cache_dir=None, attempts=3, connect_timeout_s=5.0, read_timeout_s=8.0)
    storage = Storage(replace(options, pipe_timeout_s=15.0, chunk_bytes=_READ_BYTES, chunks_ahead=0))
    start, num_bytes = time.perf_counter(), 0
    for url in urls:
        with storage.open(url) as stream:
            head = stream.read(_READ_BYTES)
        num_bytes += len(head)
        if len(head) < _TAR_BLOCK and url.endswith(".tar"):
            return bad(_CHECK, f"{url} has {len(head)} bytes: no tar is so short. Correct {flag}", shared=True)
        if url.endswith(".tar") and head[_MAGIC] != b"ustar" and any(head[:_TAR_BLOCK]):
            return bad(_CHECK, f"{url} is no tar (no ustar header): correct {flag}", shared=True)
    seconds = time.perf_counter() - start
    text = f"{flag}: {num_bytes / 1024:.0f} KiB of {len(urls)} read in {seconds:.2f} s"
    if seconds > _SLOW_S:
        return warning(_CHECK, f"{text}, which is slow")
    return ok(_CHECK, text)


def has_data(data: DataConfig) -> bool:
    """Whether there is anything to be read: synthetic samples are nowhere."""
    return any((data.train_data, data.train_data_manifest, data.val_data))
