"""Opens shards as streams of bytes, wherever they are: files, http(s), s3, any fsspec URL, the output of a command.

    url -> cache? -> s3, http: object_store (ranges, read-ahead) | file | fsspec | pipe -> ShardStream.read(n), skip(n)

Reading fails in four ways, and each is an error of its own: what is not there (``ShardMissing``), what may not be read
(``AccessDenied``), what changed while it was read (``ShardChanged``), and what did not work in several attempts
(``StorageError``). A broken connection is no error: reading goes on at the byte reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from training.data.aws_command import parse_s3_copy
from training.data.shard_cache import ShardCache
from training.data.shards import PIPE_PREFIX, is_local
from training.data.storage_errors import AccessDenied, ShardChanged, ShardMissing, StorageError
from training.data.streams import FileStream, FsspecStream, PipeStream

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


@dataclass(frozen=True)
class StorageOptions:
    """How remote bytes are fetched."""

    s3_native: bool = True
    """Read ``pipe:aws s3 cp s3://... -`` without the command."""
    cache_dir: str | None = None
    cache_gib: float = 100.0
    attempts: int = 8
    """In a row without a new byte, before a read fails."""
    first_delay_s: float = 0.5
    """Before the second attempt; doubles up to ``longest_delay_s``, with jitter."""
    longest_delay_s: float = 16.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    """Without a byte: the request is dropped and asked again."""
    request_timeout_s: float = 60.0
    """For one chunk: a slower request is dropped, and the rest asked for on another connection."""
    chunk_bytes: int = 2 << 20
    chunks_ahead: int = 1
    """Chunks asked for while the one before is used."""


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
        self.counters: Counter[str] = Counter()
        """bytes_read, requests, retries, cache_hits, cache_misses, ..."""
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
        if is_local(url):
            return FileStream(url, offset, counters=self.counters)
        if url.startswith(PIPE_PREFIX):
            copy = parse_s3_copy(url.removeprefix(PIPE_PREFIX)) if self.options.s3_native else None
            if copy is None:
                return PipeStream(
                    url.removeprefix(PIPE_PREFIX), offset, options=self.options, counters=self.counters
                )
            return self._remote(copy.url, offset, settings=copy.settings)
        return self._remote(url, offset, settings={})

    def _remote(self, url: str, offset: int, *, settings: dict[str, str]) -> ShardStream:
        if self._cache is not None:
            cached = self._cache.open(url, offset, counters=self.counters)
            if cached is not None:
                return cached
        stream = self._fetch(url, offset, settings=settings)
        return stream if self._cache is None or offset else self._cache.keep(url, stream)

    def _fetch(self, url: str, offset: int, *, settings: dict[str, str]) -> ShardStream:
        if url.startswith(("s3://", "s3a://", "http://", "https://")) and "?" not in url:
            # Only here: a process that reads local files needs no network client.
            from training.data.object_store import ObjectStream

            return ObjectStream(url, offset, options=self.options, counters=self.counters, settings=settings)
        return FsspecStream(url, offset, options=self.options, counters=self.counters)


def open_shard(url: str) -> AbstractContextManager[ShardStream]:
    """A stream of a shard or another file, with the default options."""
    return Storage().open(url)
