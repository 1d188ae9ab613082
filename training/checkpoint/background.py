"""Runs one job at a time beside the training, and keeps what became of it until somebody asks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")


class Outcome(NamedTuple, Generic[Result]):
    """What became of a job: exactly one of the two."""

    result: Result | None
    error: Exception | None


class BackgroundWriter(Generic[Result]):
    """A thread for each job. A process that ends does not wait for it: call ``wait`` first if the job matters."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Outcome[Result]] = queue.SimpleQueue()

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], Result]) -> None:
        """Begins a job; not while one is running."""
        assert not self.busy
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no job is running."""
        if self._thread is not None:
            self._thread.join()

    def finished(self) -> list[Outcome[Result]]:
        """Outcomes that nobody has asked for yet."""
        outcomes = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        return outcomes

    def _run(self, job: Callable[[], Result]) -> None:
        try:
            self._outcomes.put(Outcome(job(), None))
        except Exception as error:  # whatever it is, the training must hear of it
            self._outcomes.put(Outcome(None, error))
