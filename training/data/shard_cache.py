"""Keeps whole remote shards on a local disk: for the next epoch, the next run, the other processes of this machine.

    DIR/3f2a...shard     data of a shard | its URL, size and one CRC-32 per MiB as JSON | length of the JSON | magic
    DIR/3f2a...partial   a shard that is being read; its writer holds a lock on it
    DIR/used             bytes that the directory holds; whoever changes it holds a lock on it

One rename puts data and checksums in place together. Every MiB is checked when it is served; where one is not as it
was written, the copy is removed and reading goes on remotely at the same byte. Shards are known by URL: after one has
been overwritten, empty the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from training.data.shard_copy import (
    BLOCK_BYTES,
    CopyFacts,
    ShardCopy,
    closing_on_error,
    encode_facts,
    lock_partial,
    remove_if_abandoned,
)
from training.data.storage_errors import StorageCounters

if TYPE_CHECKING:
    from training.data.storage import ShardStream

logger = logging.getLogger(__name__)

_LONGEST_PADDING = 1 << 20
"""Zeros that a tar may end with: they are read to the end of the shard, or it would never be whole."""
_FILL = 0.9
"""Of the limit is left when room is made, so that the directory is not listed for every shard."""


class ShardCache:
    """A bounded directory of shards."""

    def __init__(self, directory: str, *, gib: float) -> None:
        self._directory = Path(directory)
        self._limit = int(gib * 2**30)
        self._off = False

    def open(
        self, url: str, offset: int, *, remote: Callable[[int], ShardStream], counters: StorageCounters
    ) -> ShardStream:
        """The shard from byte ``offset`` on: its copy, else ``remote(offset)``, which is copied on its way if whole."""
        path = self._path(url)
        try:
            copy = ShardCopy(path, url)
        except FileNotFoundError:
            copy = None
        except OSError as error:
            self.give_up(error)
            copy = None
        except (ValueError, KeyError, TypeError) as error:
            self.remove_damaged(url, error, counters)
            copy = None
        if copy is not None:
            counters.add("cache_hits")
            with suppress(OSError):
                os.utime(path)  # used last, removed last
            return _CachedStream(self, url, copy, offset, remote=remote, counters=counters)
        counters.add("cache_misses")
        stream = remote(offset)
        return stream if offset else self._copying(url, stream)

    def _copying(self, url: str, stream: ShardStream) -> ShardStream:
        if self._off or stream.size is None or not 0 < stream.size <= self._limit:
            return stream
        path = self._path(url)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            writer = lock_partial(path.with_suffix(".partial"))
            if writer is None:  # another process is at it
                return stream
            with closing_on_error(writer):
                self._make_room(stream.size)
        except OSError as error:
            self.give_up(error)
            return stream
        return _CopyingStream(self, url, path, stream, writer)

    def remove_damaged(self, url: str, error: Exception, counters: StorageCounters) -> None:
        """A copy that is not what was written is not used again."""
        logger.warning("The copy of %s in %s is damaged (%s): it is read remotely.", url, self._directory, error)
        counters.add("cache_damaged")
        with suppress(OSError):
            self._path(url).unlink()

    def give_up(self, error: OSError) -> None:
        """A full or unwritable disk does not stop training: this process keeps nothing more."""
        if not self._off:
            reason = error.strerror or str(error)
            logger.warning(
                "Shards are not kept in %s any more: %s. Free space there, or correct --cache-shards.",
                self._directory,
                reason,
            )
        self._off = True

    def _path(self, url: str) -> Path:
        return self._directory / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.shard"

    def _make_room(self, size: int) -> None:
        """Counts ``size`` bytes more. At the limit the directory is counted anew, and what was unused longest goes."""
        with open(self._directory / "used", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            used = int(text) if text.isdigit() else self._limit
            if used + size > self._limit:
                used = self._evict(max(0, int(self._limit * _FILL) - size))
            file.truncate(0)
            file.write(b"%d" % (used + size))

    def _evict(self, limit: int) -> int:
        """Removes shards until ``limit`` bytes are left, and partial ones without a writer; returns how many are left.

        On POSIX a process that is reading a removed shard goes on reading it.
        """
        used = 0
        shards = []
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another process was faster
                status = path.stat()
                if path.suffix == ".shard":
                    shards.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".partial" and not remove_if_abandoned(path):
                    used += status.st_size
        used += sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if used <= limit:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            used -= size
        return used


class _CachedStream:
    """Serves a copy, MiB by MiB; goes on remotely at the first that is damaged."""

    def __init__(
        self,
        cache: ShardCache,
        url: str,
        copy: ShardCopy,
        offset: int,
        *,
        remote: Callable[[int], ShardStream],
        counters: StorageCounters,
    ) -> None:
        self._cache = cache
        self._url = url
        self._copy = copy
        self._open_remote = remote
        self._counters = counters
        self._remote: ShardStream | None = None
        self._block = b""
        self._index = -1
        self.offset = offset
        self.size: int | None = copy.facts.size

    def read(self, size: int, /) -> bytes:
        """``size`` bytes; fewer only at the end."""
        parts = []
        while size > 0 and self._remote is None and (part := self._from_block(size)):
            parts.append(part)
            size -= len(part)
            self.offset += len(part)
        if size > 0 and self._remote is not None:
            parts.append(self._remote.read(size))
            self.offset = self._remote.offset
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Moves on; blocks passed over are not read."""
        self.offset += size
        if self._remote is not None:
            self._remote.skip(size)

    def close(self) -> None:
        """Closes the copy."""
        self._copy.close()
        if self._remote is not None:
            self._remote.close()

    def _from_block(self, size: int) -> bytes:
        """Up to ``size`` bytes of the block at hand; none at the end of the shard or of what is sound."""
        if self.offset >= self._copy.facts.size:
            return b""
        index, start = divmod(self.offset, BLOCK_BYTES)
        if index != self._index:
            try:
                self._block, self._index = self._copy.block(index), index
            except (OSError, ValueError) as error:
                self._cache.remove_damaged(self._url, error, self._counters)
                self._remote = self._open_remote(self.offset)
                return b""
        return self._block if start == 0 and size >= len(self._block) else self._block[start : start + size]


class _CopyingStream:
    """Reads through, and writes what it reads to a file that becomes the copy once it is complete."""

    def __init__(self, cache: ShardCache, url: str, path: Path, stream: ShardStream, writer: BinaryIO) -> None:
        self._cache = cache
        self._url = url
        self._path = path
        self._stream = stream
        self._writer: BinaryIO | None = writer
        self._checksums: list[int] = []
        self._checksum = 0
        self.size = stream.size
        self.offset = stream.offset

    def read(self, size: int, /) -> bytes:
        """Reads, and copies."""
        data = self._stream.read(size)
        self.offset += len(data)
        if self._writer is not None:
            start = self.offset - len(data)
            try:
                self._writer.write(data)
            except OSError as error:
                self._abandon(error)
            self._add_checksums(start, memoryview(data))
        return data

    def skip(self, size: int, /) -> None:
        """Reads what is skipped as well: the copy must have it."""
        target = self.offset + size
        while self._writer is not None and self.offset < min(target, self.size or target):
            self.read(min(target - self.offset, BLOCK_BYTES))
        self._stream.skip(target - self.offset)
        self.offset = target

    def close(self) -> None:
        """Keeps the copy if the shard was read to its end, but for the padding of a tar."""
        try:
            if self._writer is not None:
                self._finish()
        finally:
            self._drop()
            self._stream.close()

    def _add_checksums(self, start: int, data: memoryview) -> None:
        while len(data):
            part = data[: BLOCK_BYTES - start % BLOCK_BYTES]
            self._checksum = zlib.crc32(part, self._checksum)
            start += len(part)
            data = data[len(part) :]
            if start % BLOCK_BYTES == 0 or start == self.size:
                self._checksums.append(self._checksum)
                self._checksum = 0

    def _finish(self) -> None:
        assert self.size is not None
        if 0 < self.size - self.offset <= min(_LONGEST_PADDING, self.offset):
            with suppress(RuntimeError):  # the padding could not be read: the samples were
                self.read(self.size - self.offset)
        if self.offset != self.size or self._writer is None:
            return
        try:
            self._writer.write(encode_facts(CopyFacts(self._url, self.size, self._checksums)))
            self._writer.flush()
            os.rename(self._path.with_suffix(".partial"), self._path)
        except OSError as error:
            self._abandon(error)
            return
        writer, self._writer = self._writer, None
        writer.close()

    def _abandon(self, error: OSError) -> None:
        self._cache.give_up(error)
        self._drop()

    def _drop(self) -> None:
        """Removes what is incomplete."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        with suppress(OSError):
            self._path.with_suffix(".partial").unlink()
        with suppress(OSError):  # closing writes what is buffered: the disk may be full
            writer.close()
