"""How a process of a job ends early, whatever its main thread is waiting for."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

logger = logging.getLogger(__name__)

_LAST_WORDS_S = 10.0
"""How long writing the last log lines may take: a handler may be stuck in the very thing that hangs."""


class Failure(NamedTuple):
    """The first failure of a job."""

    rank: int
    exit_code: int
    text: str
    silent: Sequence[int] = ()
    """Ranks that do not hear of it. Those that only hang are killed by their neighbours."""


class JobEnd:
    """What becomes known after the job has begun, and belongs into its end. One for each process."""

    def __init__(self) -> None:
        self.last_act: Callable[[], None] | None = None
        """Called right before the process ends itself; not called when it ends in order."""
        self.known_deaths: Callable[[], Sequence[tuple[int, int, int, str]]] = tuple
        """(rank, process number, exit code, reason) of the processes whose end was put on record by others."""

    def fail(self, rank: int, exit_code: int, text: str, silent: Sequence[int] = ()) -> NoReturn:
        """Ends all processes of the job, from any thread, whatever their main threads wait for.

        Args:
            rank: whose failure it is; any rank may find it out.
            silent: ranks that hang, cannot end by themselves, and are killed by their neighbours.
        """
        end_in_any_case(exit_code)
        logger.critical("rank %d failed: %s", rank, text)
        self.leave(exit_code)

    def leave(self, exit_code: int) -> NoReturn:
        """Ends this process."""
        if self.last_act is not None:
            try:
                self.last_act()
            except Exception as error:  # whatever it is, it must not keep the process alive
                logger.error("on the way out: %r", error)
        for child in multiprocessing.active_children():
            child.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the main thread may be in a collective that never returns, or in the teardown of one.
        os._exit(exit_code)


def end_in_any_case(exit_code: int) -> None:
    """Ends this process some seconds from now, if it is not gone by then."""
    timer = threading.Timer(_LAST_WORDS_S, os._exit, [exit_code])
    timer.daemon = True
    timer.start()
