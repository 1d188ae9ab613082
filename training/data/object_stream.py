"""Reads an object as a stream: in ranges, the next ones on their way while one is used.

offset -> [ chunk being used | chunk ahead | chunk ahead ] -> not asked for yet
          pieces arrive in a thread per chunk; what breaks off goes on at the byte reached
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from training.data.object_store import OutOfRange, RemoteObject, Response, Version
from training.data.storage_errors import Patience, ShardChanged, StorageCounters, Transient
from training.data.streams import RestartedStream

if TYPE_CHECKING:
    from training.data.storage import StorageOptions

logger = logging.getLogger(__name__)

_THREADS = 64


class ObjectStream:
    """An object from byte ``offset`` on. Memory: the chunk being used and those ahead.

    Raises:
        RangesUnsupported: the server sends whole objects only; see ``whole_object_stream``.
        ShardMissing, AccessDenied, ShardChanged, StorageError: also while reading.
    """

    def __init__(
        self, remote: RemoteObject, offset: int, *, options: StorageOptions, counters: StorageCounters
    ) -> None:
        self._remote = remote
        self._options = options
        self._counters = counters
        self._version: Version | None = None
        self._chunks: deque[_Chunk] = deque()
        self._piece = memoryview(b"")
        self._asked = offset  # the first byte that no chunk covers
        self.offset = offset
        self._ask(offset + options.chunk_bytes)
        try:
            self._version = self._chunks[0].wait_for_version()
        except BaseException:
            self.close()
            raise
        self.size: int | None = self._version.size
        self._asked = min(self._asked, self._version.size)
        self._ask_ahead()

    def read(self, size: int, /) -> bytes:
        """``size`` bytes; fewer only at the end of the object."""
        if size <= len(self._piece):
            return self._take(size)
        parts = []
        while size > 0 and (len(self._piece) or self._next_piece()):
            parts.append(self._take(min(size, len(self._piece))))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Drops what has come or is on its way; of what lies beyond, nothing is asked for."""
        target = self.offset + size
        if target >= self._asked:
            self.close()
            self.offset = self._asked = target
        while self.offset < target:
            if len(self._piece):
                step = min(target - self.offset, len(self._piece))
                self._piece = self._piece[step:]
                self.offset += step
            elif target < self._chunks[0].end:
                self._next_piece()
            else:
                self._chunks[0].drop()
                self.offset = self._chunks[0].end
                self._next_chunk()
        self._ask_ahead()

    def close(self) -> None:
        """Drops what is on its way."""
        for chunk in self._chunks:
            chunk.drop()
        self._chunks.clear()
        self._piece = memoryview(b"")

    def _take(self, size: int) -> bytes:
        data = bytes(self._piece[:size])
        self._piece = self._piece[size:]
        self.offset += size
        return data

    def _next_piece(self) -> bool:
        """Waits for the next bytes; False at the end of the object."""
        while self._chunks:
            piece = self._chunks[0].next_piece()
            if piece is not None:
                self._piece = memoryview(piece)
                return True
            self._next_chunk()
            self._ask_ahead()
        return False

    def _next_chunk(self) -> None:
        self._chunks.popleft()
        if self._chunks:
            _ahead.give_back(self._chunks[0])  # it is used now

    def _ask_ahead(self) -> None:
        assert self.size is not None
        while len(self._chunks) <= self._options.chunks_ahead and self._asked < self.size:
            end = min(self.size, self._asked + self._options.chunk_bytes)
            is_ahead = len(self._chunks) > 0
            if is_ahead and not _ahead.take(end - self._asked, limit=self._options.ahead_bytes):
                return
            self._ask(end, is_ahead=is_ahead)

    def _ask(self, end: int, *, is_ahead: bool = False) -> None:
        chunk = _Chunk(self._asked, end)
        chunk.ahead_bytes = end - self._asked if is_ahead else 0
        fetch = _Fetch(self._remote, chunk, self._version, options=self._options, counters=self._counters)
        _threads(os.getpid()).submit(fetch.run)
        self._chunks.append(chunk)
        self._asked = end


class _Chunk:
    """Bytes [start, end), fewer at the end of the object: pieces put in by one thread and taken out by another."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.dropped = False
        self.ahead_bytes = 0
        """Of the budget of this process."""
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._version: Version | None = None
        self._finished = False
        self._error: BaseException | None = None

    def open(self, version: Version) -> None:
        """The server has answered."""
        with self._changed:
            self._version = version
            self.end = min(self.end, max(self.start, version.size))
            self._changed.notify_all()

    def put(self, piece: bytes) -> None:
        with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._finished = True
            self._error = error
            self._changed.notify_all()

    def drop(self) -> None:
        """Nobody wants the rest."""
        _ahead.give_back(self)
        with self._changed:
            self.dropped = True
            self._pieces.clear()
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Waits, but not for a chunk that nobody wants."""
        with self._changed:
            self._changed.wait_for(lambda: self.dropped, timeout=seconds)

    def wait_for_version(self) -> Version:
        with self._changed:
            self._changed.wait_for(lambda: self._version is not None or self._finished)
            if self._version is None:
                assert self._error is not None
                raise self._error
            return self._version

    def next_piece(self) -> bytes | None:
        """The next bytes as soon as they have come, None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._finished)
            if self._pieces:
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            return None


class _AheadBudget:
    """The bytes that all streams of this process have asked for ahead of their use."""

    def __init__(self) -> None:
        self.used = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int, *, limit: int) -> bool:
        """Whether so many more are within the limit; they are counted then."""
        with self._lock:
            if self.used + num_bytes > limit:
                return False
            self.used += num_bytes
            return True

    def give_back(self, chunk: _Chunk) -> None:
        """The chunk is not ahead any more; it may be said twice."""
        with self._lock:
            self.used -= chunk.ahead_bytes
            chunk.ahead_bytes = 0


_ahead = _AheadBudget()


class _Fetch:
    """Brings the bytes of one chunk, in as many requests as it takes."""

    def __init__(
        self,
        remote: RemoteObject,
        chunk: _Chunk,
        version: Version | None,
        *,
        options: StorageOptions,
        counters: StorageCounters,
    ) -> None:
        self._remote = remote
        self._chunk = chunk
        self._version = version
        self._options = options
        self._counters = counters
        self._position = chunk.start

    def run(self) -> None:
        """Fills the chunk; an error is handed to whoever reads it."""
        try:
            self._fill()
        except BaseException as error:
            self._chunk.finish(error)
        else:
            self._chunk.finish()

    def _fill(self) -> None:
        patience = Patience(self._options, counters=self._counters)
        while not self._chunk.dropped:
            before = self._position
            try:
                self._attempt()
                return
            except Transient as error:
                patience.progress(self._position - before)
                self._chunk.pause(patience.failed(f"Reading {self._remote.name!r} at byte {self._position}", error))

    def _attempt(self) -> None:
        self._counters.add("requests")
        try:
            response = self._remote.get(self._position, self._chunk.end, expected=self._version)
        except OutOfRange:
            self._check_end()
            return
        self._version = response.version
        self._chunk.open(response.version)
        for piece in self._fast_enough(response.pieces):
            if self._chunk.dropped:
                return
            self._chunk.put(piece)
            self._position += len(piece)
            self._counters.add("bytes_read", len(piece))
        if self._position < self._chunk.end:
            raise Transient(f"the body ended at byte {self._position}, before byte {self._chunk.end}")

    def _fast_enough(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces of a body, as long as they come at the lowest speed that is put up with."""
        options = self._options
        since, num_bytes = time.monotonic(), 0
        for piece in pieces:
            yield piece
            num_bytes += len(piece)
            elapsed = time.monotonic() - since
            if elapsed < options.low_speed_s:
                continue
            speed = f"{num_bytes / elapsed / 1000:.0f} kB/s for {elapsed:.0f} s"
            if num_bytes < options.low_speed_bytes_per_s * elapsed:
                raise Transient(f"only {speed}")
            logger.warning("%r comes slowly: %s. Check the network and the storage.", self._remote.name, speed)
            since, num_bytes = time.monotonic(), 0

    def _check_end(self) -> None:
        """An empty object has no first byte, and one that is read from its end on has no next one."""
        self._counters.add("requests")
        version = self._remote.head()
        if self._position > version.size:
            raise ShardChanged(
                f"{self._remote.name!r} has {version.size} bytes and was read from byte {self._position} on: it is not "
                "the shard that reading began with."
            )
        if self._position < version.size:
            raise Transient(f"byte {self._position} of {version.size} is said to be out of range")
        self._chunk.open(version)


def whole_object_stream(
    remote: RemoteObject, offset: int, *, options: StorageOptions, counters: StorageCounters
) -> RestartedStream:
    """An object on a server that knows no ranges: after a break it is read from the start again.

    Args:
        remote: made with ``whole=True``.
    """
    first: list[Version] = []

    def start() -> _WholeObject:
        counters.add("requests")
        response = remote.get(0, None, expected=first[0] if first else None)
        first[:] = [response.version]
        return _WholeObject(response)

    return RestartedStream(f"Reading {remote.name!r}", offset, start=start, options=options, counters=counters)


class _WholeObject:
    """The body of one answer."""

    def __init__(self, response: Response) -> None:
        self._pieces = response.pieces
        self._piece = memoryview(b"")
        self._left = response.version.size

    def read(self, size: int, /) -> bytes:
        if not len(self._piece):
            self._piece = memoryview(next(self._pieces, b""))
        data = bytes(self._piece[:size])
        self._piece = self._piece[len(data) :]
        self._left -= len(data)
        if not data and self._left:
            raise Transient(f"the body ended {self._left} bytes early")
        return data

    def close(self) -> None:
        self._pieces = iter(())


@lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads that wait for bytes; of this process, as none survives a fork."""
    return ThreadPoolExecutor(_THREADS, f"ranges-{pid}")
