"""Fetches one chunk of an object in a thread: its pieces as they come, what breaks off again from the byte reached."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from training.data.object_store import OutOfRange, RemoteObject, Version
from training.data.storage_errors import Patience, ShardChanged, StorageCounters, Transient

if TYPE_CHECKING:
    from training.data.storage import StorageOptions

logger = logging.getLogger(__name__)

_THREADS = 128
"""Started as they are needed; they wait for bytes nearly all the time."""


class Chunk:
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
        ahead_budget.give_back(self)
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


class AheadBudget:
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

    def give_back(self, chunk: Chunk) -> None:
        """The chunk is not ahead any more; it may be said twice."""
        with self._lock:
            self.used -= chunk.ahead_bytes
            chunk.ahead_bytes = 0


ahead_budget = AheadBudget()


class Fetch:
    """Brings the bytes of one chunk, in as many requests as it takes."""

    def __init__(
        self,
        remote: RemoteObject,
        chunk: Chunk,
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


@lru_cache(maxsize=1)
def fetch_threads(pid: int) -> ThreadPoolExecutor:
    """Threads that wait for bytes; of this process, as none survives a fork."""
    return ThreadPoolExecutor(_THREADS, f"ranges-{pid}")
