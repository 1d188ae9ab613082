"""How reading a shard can fail, and how long to wait before trying again."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from typing import Protocol

logger = logging.getLogger(__name__)


class StorageError(RuntimeError):
    """Bytes that should be there could not be read in several attempts; reading later may succeed."""


class ShardMissing(StorageError):
    """There is no such object or file."""


class AccessDenied(StorageError):
    """No or wrong credentials, or no permission. Waiting does not mend it, so a run ends at once."""


class ShardChanged(StorageError):
    """The object is not the one that reading began with."""


class RetryOptions(Protocol):
    """The part of ``StorageOptions`` that a ``Patience`` needs."""

    @property
    def attempts(self) -> int: ...
    @property
    def first_delay_s(self) -> float: ...
    @property
    def longest_delay_s(self) -> float: ...


class Patience:
    """Counts failed attempts since the last progress, and waits between them: exponentially, with jitter."""

    def __init__(self, options: RetryOptions, *, counters: Counter[str]) -> None:
        self._options = options
        self._counters = counters
        self._failed = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """Bytes have come: the next failure is the first again."""
        self._failed = 0

    def failed(self, what: str, cause: object) -> None:
        """Waits before the next attempt.

        Raises:
            StorageError: there have been enough of them.
        """
        if self._failed == 0:
            self._since = time.monotonic()
        self._failed += 1
        if self._failed >= self._options.attempts:
            raise StorageError(
                f"{what} failed {self._failed} times in {time.monotonic() - self._since:.0f} s (last: {cause}): check "
                "the storage; --resume latest goes on where the run was."
            )
        self._counters["retries"] += 1
        delay_s = min(self._options.longest_delay_s, self._options.first_delay_s * 2 ** (self._failed - 1))
        delay_s *= random.Random().uniform(0.5, 1.0)  # not the global generator, whose numbers are the augmentation's
        logger.warning("%s: %s Attempt %d in %.1f s.", what, cause, self._failed + 1, delay_s)
        time.sleep(delay_s)
