"""Keeps whole remote shards on a local disk: for the next epoch, the next run, the other processes of this machine.

    DIR/3f2a....tar     a shard, named by the digest of its URL
    DIR/3f2a....json    its URL, size and CRC-32, written last: without it the shard does not count
    DIR/.partial-*      a shard that is being read

A shard is copied while it is read, and counts once it has been read to its end. It is checked against its CRC before
a process serves it for the first time. Shards are named by URL: after overwriting them, empty the directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.streams import FileStream

if TYPE_CHECKING:
    from training.data.storage import ShardStream

logger = logging.getLogger(__name__)

_PARTIAL_PREFIX = ".partial-"
_ABANDONED_S = 24 * 3600
_CHECK_BYTES = 1 << 22
_LONGEST_PADDING = 1 << 20
"""Zeros that a tar may end with: they are read to the end of the shard, or it would never be whole."""


class ShardCache:
    """A bounded directory of shards. Safe between processes: what is served was renamed into place as a whole."""

    def __init__(self, directory: str, *, gib: float) -> None:
        self._directory = Path(directory)
        self._limit = int(gib * 2**30)
        self._checked: set[str] = set()
        self._off = False

    def open(self, url: str, offset: int, *, counters: Counter[str]) -> FileStream | None:
        """The local copy of a shard; None if there is none, or it is damaged and was removed."""
        data, facts = self._paths(url)
        try:
            expected = json.loads(facts.read_text())
            if url not in self._checked and not _is_whole(data, expected):
                logger.warning("The copy of %s in the shard cache is damaged: it is read from its origin again.", url)
                counters["cache_damaged"] += 1
                self._remove(data)
                return None
            self._checked.add(url)
            os.utime(data)  # used last, removed last
            stream = FileStream(str(data), offset, counters=Counter())
        except (OSError, ValueError, KeyError, RuntimeError):
            counters["cache_misses"] += 1
            return None
        counters["cache_hits"] += 1
        return stream

    def keep(self, url: str, stream: ShardStream) -> ShardStream:
        """The stream itself, copied to the cache on its way; as it was if the cache cannot be written."""
        if self._off:
            return stream
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return _CopyingStream(self, url, stream, self._directory)
        except OSError as error:
            self.give_up(error)
            return stream

    def commit(self, url: str, partial: str, *, size: int, checksum: int) -> None:
        """Puts a complete copy in its place, and makes room."""
        data, facts = self._paths(url)
        if size > self._limit:
            os.unlink(partial)
            return
        self._make_room(size)
        os.replace(partial, data)
        with tempfile.NamedTemporaryFile("w", dir=self._directory, prefix=_PARTIAL_PREFIX, delete=False) as file:
            json.dump({"url": url, "size": size, "crc32": checksum}, file)
        os.replace(file.name, facts)

    def give_up(self, error: OSError) -> None:
        """A full or unwritable disk does not stop training: nothing more is kept by this process."""
        self._off = True
        logger.warning("Shards are not cached in %s any more: %s. Free space, or correct --cache-shards.", *(
            self._directory, error,
        ))

    def _paths(self, url: str) -> tuple[Path, Path]:
        name = hashlib.sha256(url.encode()).hexdigest()[:32]
        return self._directory / f"{name}.tar", self._directory / f"{name}.json"

    def _make_room(self, size: int) -> None:
        """Removes the shards unused for longest. One that is being read stays readable until it is closed."""
        now = time.time()
        kept = []
        for entry in os.scandir(self._directory):
            status = _status(entry)
            if status is None:
                continue
            if entry.name.startswith(_PARTIAL_PREFIX) and now - status.st_mtime > _ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
            elif entry.name.endswith(".tar"):
                kept.append((status.st_mtime, status.st_size, Path(entry.path)))
        used = sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if used + size <= self._limit:
                return
            self._remove(path)
            used -= bytes_

    def _remove(self, data: Path) -> None:
        data.with_suffix(".json").unlink(missing_ok=True)
        data.unlink(missing_ok=True)


class _CopyingStream:
    """Reads through, and writes what it reads to a file that becomes the copy once it is complete."""

    def __init__(self, cache: ShardCache, url: str, stream: ShardStream, directory: Path) -> None:
        self._cache = cache
        self._url = url
        self._stream = stream
        self._checksum = 0
        handle, self._partial = tempfile.mkstemp(dir=directory, prefix=_PARTIAL_PREFIX)
        self._file = os.fdopen(handle, "wb", buffering=_CHECK_BYTES)
        self._copying = True

    @property
    def offset(self) -> int:
        """Of the next byte."""
        return self._stream.offset

    @property
    def size(self) -> int | None:
        """Of the shard, as far as it is known."""
        return self._stream.size

    def read(self, size: int, /) -> bytes:
        """Reads, and copies."""
        data = self._stream.read(size)
        if self._copying:
            self._checksum = zlib.crc32(data, self._checksum)
            try:
                self._file.write(data)
            except OSError as error:
                self._abandon(error)
        return data

    def skip(self, size: int, /) -> None:
        """Reads what is skipped as well: the copy must have it."""
        if not self._copying:
            self._stream.skip(size)
            return
        while size and (data := self.read(min(size, _CHECK_BYTES))):
            size -= len(data)

    def close(self) -> None:
        """Keeps the copy if the shard was read to its end, but for the padding of a tar."""
        try:
            if self._copying:
                self._finish()
        finally:
            self._stream.close()

    def _finish(self) -> None:
        size = self._stream.size
        try:
            if size is not None and 0 < size - self.offset <= _LONGEST_PADDING and self.offset:
                self.read(size - self.offset)
            if not self._copying:
                return
            if size is None or self.offset < size:
                self._drop()
                return
            self._file.close()
            self._cache.commit(self._url, self._partial, size=size, checksum=self._checksum)
        except OSError as error:
            self._abandon(error)
        except RuntimeError:  # the padding could not be read: the samples were
            self._drop()

    def _abandon(self, error: OSError) -> None:
        self._drop()
        self._cache.give_up(error)

    def _drop(self) -> None:
        self._copying = False
        try:
            self._file.close()
        except OSError:
            pass  # what could not be written is not wanted any more
        Path(self._partial).unlink(missing_ok=True)


def _is_whole(data: Path, expected: dict[str, int]) -> bool:
    checksum = 0
    with data.open("rb") as file:
        if os.fstat(file.fileno()).st_size != expected["size"]:
            return False
        while block := file.read(_CHECK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum == expected["crc32"]


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except FileNotFoundError:  # another process was faster
        return None
