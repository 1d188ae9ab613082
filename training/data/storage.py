"""Opens shards as streams of bytes, wherever they are: files, http(s), s3, any fsspec URL, the output of a command.

    url -> cache? -> s3, http: object_store (ranges, read-ahead) | file | fsspec | pipe -> ShardStream.read(n), skip(n)

Reading fails in four ways, and each is an error of its own: what is not there (``ShardMissing``), what may not be read
(``AccessDenied``), what changed while it was read (``ShardChanged``), and what did not work in several attempts
(``StorageError``). A broken connection is no error: reading goes on at the byte reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from training.data.aws_command import parse_s3_copy
from training.data.pipes import pipe_stream
from training.data.shard_cache import ShardCache
from training.data.shards import PIPE_PREFIX, is_local
from training.data.storage_errors import AccessDenied, ShardChanged, ShardMissing, StorageCounters, StorageError
from training.data.streams import file_stream, fsspec_stream

__all__ = [
    "AccessDenied",
    "ShardChanged",
    "ShardMissing",
    "ShardStream",
    "Storage",
    "StorageError",
    "StorageOptions",
    "open_shard",
]

_MAX_SMALL_FILE_BYTES = 1 << 30
_S3_PREFIXES = ("s3://", "s3a://", "s3n://")
_HTTP_PREFIXES = ("http://", "https://")
_FILE_PREFIX = "file://"


@dataclass(frozen=True)
class StorageOptions:
    """How shards are fetched. A remote stream holds up to ``(1 + chunks_ahead) * chunk_bytes`` in memory."""

    s3_native: bool = True
    """Read ``pipe:aws s3 cp s3://... -`` without the command."""
    cache_dir: str | None = None
    cache_gib: float = 100.0
    attempts: int = 8
    """In a row without progress, before a read fails: about 40 s of waiting between them."""
    first_delay_s: float = 0.5
    """Before the second attempt, with jitter; doubles up to ``longest_delay_s``."""
    longest_delay_s: float = 16.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    """Without a byte: the request is dropped, and the rest asked for anew."""
    low_speed_bytes_per_s: float = 100e3
    low_speed_s: float = 20.0
    """A request that brings less than ``low_speed_bytes_per_s`` for so long is dropped as well."""
    pipe_timeout_s: float = 120.0
    """Without output, a command is ended and run again."""
    chunk_bytes: int = 4 << 20
    """Asked for in one request."""
    chunks_ahead: int = 2
    """On their way while one is used."""
    ahead_bytes: int = 128 << 20
    """Of all streams of a process together: a rank may have 48 lanes, each with a stream, on one worker. A stream that
    finds nothing left asks for its next chunk when it needs it."""


class ShardStream(Protocol):
    """Bytes in order."""

    offset: int
    """Of the next byte, in the shard."""
    size: int | None
    """Of the shard, where that is known."""

    def read(self, size: int, /) -> bytes:
        """``size`` bytes; fewer only at the end of the shard."""

    def skip(self, size: int, /) -> None:
        """Goes on ``size`` bytes further, without reading them where the storage allows it."""

    def close(self) -> None:
        """Gives back what is open."""


class Storage:
    """Opens shards. Pickles as its options; clients are made in the process that uses them."""

    def __init__(self, options: StorageOptions = StorageOptions()) -> None:
        self.options = options
        self.counters = StorageCounters()
        """bytes_read (from where the shards lie: none from the cache), requests, retries, cache_hits, cache_misses,
        cache_damaged."""
        self._cache = ShardCache(options.cache_dir, gib=options.cache_gib) if options.cache_dir is not None else None

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageOptions]]:
        return Storage, (self.options,)

    def open(self, url: str, *, offset: int = 0) -> AbstractContextManager[ShardStream]:
        """A stream of the shard from byte ``offset`` on.

        Raises, here or while reading:
            ShardMissing, AccessDenied, ShardChanged, StorageError.
        """
        return self._open(url, offset)

    @contextmanager
    def _open(self, url: str, offset: int) -> Iterator[ShardStream]:
        stream = self._stream(url, offset)
        try:
            yield stream
        finally:
            stream.close()

    def read_bytes(self, url: str) -> bytes:
        """A small file as a whole.

        Raises:
            ShardMissing: there is none. AccessDenied, StorageError.
        """
        with self._open(url, 0) as stream:
            return stream.read(_MAX_SMALL_FILE_BYTES)

    def _stream(self, url: str, offset: int) -> ShardStream:
        if url.startswith(PIPE_PREFIX):
            command = url.removeprefix(PIPE_PREFIX)
            copy = parse_s3_copy(command) if self.options.s3_native else None
            if copy is None:
                return pipe_stream(command, offset, options=self.options, counters=self.counters)
            return self._remote(copy.url, offset, settings=copy.settings)
        if is_local(url) or url.startswith(_FILE_PREFIX):
            path = url.removeprefix(_FILE_PREFIX)
            return file_stream(path, offset, options=self.options, counters=self.counters)
        return self._remote(url, offset, settings=())

    def _remote(self, url: str, offset: int, *, settings: tuple[tuple[str, str], ...]) -> ShardStream:
        fetch = partial(self._fetch, url, settings=settings)
        if self._cache is None:
            return fetch(offset)
        # The same name at another endpoint is another shard.
        name = " ".join((url, *(value for key, value in settings if key == "endpoint")))
        return self._cache.open(name, offset, remote=fetch, counters=self.counters)

    def _fetch(self, url: str, offset: int, *, settings: tuple[tuple[str, str], ...]) -> ShardStream:
        if not url.startswith((*_S3_PREFIXES, *_HTTP_PREFIXES)):
            return fsspec_stream(url, offset, options=self.options, counters=self.counters)
        # Only here: a process that reads local files needs no network client.
        from training.data.object_store import RangesUnsupported, RemoteObject
        from training.data.object_stream import ObjectStream, whole_object_stream

        try:
            remote = RemoteObject(url, options=self.options, settings=settings)
            return ObjectStream(remote, offset, options=self.options, counters=self.counters)
        except RangesUnsupported:
            remote = RemoteObject(url, options=self.options, settings=settings, whole=True)
            return whole_object_stream(remote, offset, options=self.options, counters=self.counters)


def open_shard(url: str) -> AbstractContextManager[ShardStream]:
    """A stream of a shard or another file, with the default options."""
    return Storage().open(url)
