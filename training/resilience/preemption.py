"""Notices the signals by which a scheduler or a user ends a run; the loop then saves and stops.

    USR1, USR2, TERM, INT   a flag, which all ranks agree on in the next step; a second signal changes nothing
    QUIT                    the stack of every thread to stderr; the run goes on

Python runs a signal handler between two instructions of the main thread, and the main thread of a rank may be in a
collective for minutes. The number of a signal also travels through a pipe, from C and at once, to a thread that sets
the flag and says so in the log.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_STDERR = 2
_CLOSE = b"\0"
_listening: list[Preemption] = []
_forking = threading.local()


class Preemption:
    """Whether this process was asked to stop, and by which signal. Made and closed by the main thread.

    Until it is made, signals do what they always do: there is nothing to save before the ranks have met.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._noted = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._handle) for number in STOP_SIGNALS
        }
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        faulthandler.register(signal.SIGQUIT, file=_STDERR, all_threads=True, chain=False)
        self._closed = False
        _listening.append(self)

    @property
    def requested(self) -> str | None:
        """The first signal that asked this process to stop, such as ``SIGTERM``; None while there was none."""
        return self._requested

    def agreed(self, gather_objects: Callable[[str | None], list[str | None]]) -> str | None:
        """The signal that any rank received, the same on all of them. Collective: all ranks, host sync.

        For the few places where no step carries the request: before the first one, between two evaluations, and to
        name the signal once the ranks have stopped.
        """
        return next((name for name in gather_objects(self._requested) if name is not None), None)

    def close(self) -> None:
        """Gives the signals back to whoever handled them before. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        _listening.remove(self)
        faulthandler.unregister(signal.SIGQUIT)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.setblocking(True)
        self._writer.send(_CLOSE)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two instructions, perhaps of the logging module: a flag and nothing else."""
        if self._requested is None:
            self._requested = signal.Signals(number).name

    def _listen(self) -> None:
        """The thread: sees a signal whatever the main thread waits for."""
        while (number := self._reader.recv(1)) != _CLOSE:
            if number[0] in STOP_SIGNALS:
                self._note(signal.Signals(number[0]).name)

    def _note(self, name: str) -> None:
        if not self._noted.is_set():
            self._noted.set()
            if self._requested is None:
                self._requested = name
            logger.warning("%s received: the run saves and stops after the step, or evaluation, it is in.", name)
        else:
            logger.warning("%s received: the run is about to stop already (%s).", name, self._requested)


def shield_worker(worker: int) -> None:
    """A ``worker_init_fn``: the scheduler's signal to the process group of a rank does not reach its worker."""
    os.setsid()


def _hold_signals() -> None:
    """A signal to a child that has just been forked would run the parent's handler there, and reach its pipe."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _go_on_after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _leave_signals_to_parent() -> None:
    """In a forked child: the signals are meant for the parent, and the pipe that they are reported through is its."""
    if _listening:
        _listening.clear()
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            # TERM is how multiprocessing ends its processes; ignoring it even for a moment would drop one that waits.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _go_on_after_fork()


os.register_at_fork(before=_hold_signals, after_in_parent=_go_on_after_fork, after_in_child=_leave_signals_to_parent)
