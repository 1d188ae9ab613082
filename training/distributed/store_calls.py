"""Requests to the store that come back even if the process that hosts it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class StoreSilent(RuntimeError):
    """The store has a connection, and gives no answer: its host hangs."""


def answer_within(timeout_s: float, request: Callable[[], T]) -> T:
    """The request's result or error; where neither comes in time, the request is left to a thread of its own.

    The store's own timeout is for keys that nobody has set yet; no timeout ends a request that is never answered.

    Raises:
        StoreSilent: no answer.
    """
    call = _Call(request)
    thread = threading.Thread(target=call, name="store-request", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise StoreSilent(f"no answer within {timeout_s:g} s")
    if call.error is not None:
        raise call.error
    return call.answers[0]


class _Call(Generic[T]):
    def __init__(self, request: Callable[[], T]) -> None:
        self.answers: list[T] = []
        self.error: RuntimeError | None = None
        self._request = request

    def __call__(self) -> None:
        try:
            self.answers.append(self._request())
        except RuntimeError as error:
            self.error = error
