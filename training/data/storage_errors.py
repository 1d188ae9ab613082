"""How reading a shard can fail, and how long to wait before trying again."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from typing import Protocol

logger = logging.getLogger(__name__)

_QUIET_ATTEMPTS = 2
_PROGRESS_BYTES = 1 << 20
"""An attempt that brought less is no progress: who breaks off after a few bytes each time is not asked for ever."""
COUNTERS = ("bytes_read", "requests", "retries", "cache_hits", "cache_misses", "cache_damaged")


class StorageError(RuntimeError):
    """Bytes that should be there could not be read in several attempts; reading later may succeed."""


class ShardMissing(StorageError):
    """There is no such object or file."""


class AccessDenied(StorageError):
    """No or wrong credentials, or no permission. Waiting does not mend it, so a run ends at once."""


class ShardChanged(StorageError):
    """The object is not the one that reading began with."""


class Transient(Exception):
    """One attempt failed in a way that another may not; its text is the cause."""


class RetryOptions(Protocol):
    """The part of ``StorageOptions`` that a ``Patience`` needs."""

    @property
    def attempts(self) -> int: ...
    @property
    def first_delay_s(self) -> float: ...
    @property
    def longest_delay_s(self) -> float: ...


class StorageCounters(Counter[str]):
    """Counts that only grow, raised from several threads. All names exist from the start: it may be copied any time."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(COUNTERS, 0))
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Raises one count."""
        with self._lock:
            self[name] += count


class Patience:
    """Counts failed attempts since the last progress, and says how long to wait: exponentially longer, with jitter."""

    def __init__(self, options: RetryOptions, *, counters: StorageCounters, attempts: int | None = None) -> None:
        self._options = options
        self._counters = counters
        self._attempts = options.attempts if attempts is None else attempts
        self._failed = 0
        self._progress = 0
        self._since = time.monotonic()

    def progress(self, num_bytes: int) -> None:
        """Bytes have come; after enough of them the next failure is the first again."""
        self._progress += num_bytes
        if self._progress >= _PROGRESS_BYTES:
            self._failed = 0

    def failed(self, what: str, cause: object) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            StorageError: there have been enough of them.
        """
        if self._failed == 0:
            self._since = time.monotonic()
        self._failed += 1
        self._progress = 0
        if self._failed >= self._attempts:
            raise StorageError(
                f"{what} failed {self._failed} times in {time.monotonic() - self._since:.0f} s (last: {cause}): check "
                "the storage; --resume latest goes on where the run was."
            )
        self._counters.add("retries")
        delay_s: float = min(self._options.longest_delay_s, self._options.first_delay_s * 2 ** (self._failed - 1))
        delay_s *= random.Random().uniform(0.5, 1.0)  # not the global generator, whose numbers are the augmentation's
        level = logging.INFO if self._failed < _QUIET_ATTEMPTS else logging.WARNING
        logger.log(level, "%s: %s. Attempt %d in %.1f s.", what, cause, self._failed + 1, delay_s)
        return delay_s
