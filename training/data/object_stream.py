"""Reads an object as a stream: in ranges, the next ones on their way while one is used.

offset -> [ chunk being used | chunk ahead | chunk ahead ] -> not asked for yet
          pieces arrive in a thread per chunk; what breaks off goes on at the byte reached
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from training.data.object_chunks import Chunk, Fetch, ahead_budget, fetch_threads
from training.data.object_store import RemoteObject, Response, Version
from training.data.storage_errors import StorageCounters, Transient
from training.data.streams import RestartedStream

if TYPE_CHECKING:
    from training.data.storage import StorageOptions


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
        self._chunks: deque[Chunk] = deque()
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
            ahead_budget.give_back(self._chunks[0])  # it is used now

    def _ask_ahead(self) -> None:
        assert self.size is not None
        while len(self._chunks) <= self._options.chunks_ahead and self._asked < self.size:
            end = min(self.size, self._asked + self._options.chunk_bytes)
            is_ahead = len(self._chunks) > 0
            if is_ahead and not ahead_budget.take(end - self._asked, limit=self._options.ahead_bytes):
                return
            self._ask(end, is_ahead=is_ahead)

    def _ask(self, end: int, *, is_ahead: bool = False) -> None:
        chunk = Chunk(self._asked, end)
        chunk.ahead_bytes = end - self._asked if is_ahead else 0
        fetch = Fetch(self._remote, chunk, self._version, options=self._options, counters=self._counters)
        fetch_threads(os.getpid()).submit(fetch.run)
        self._chunks.append(chunk)
        self._asked = end


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
