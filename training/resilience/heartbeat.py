"""Shows a monitor beside this process that it is alive, once a second.

The beat comes from a Python thread: where native code holds the interpreter, or the process is stopped, there is none,
and the monitor writes the stacks and kills the process. Its neighbours then end the job with the code of a hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from training.resilience import heartbeat_monitor
from training.resilience.exit_codes import NODE_SUSPECTED

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_CLOSE_S = 5.0
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP)
"""They are sent to the whole process group, and meant for the rank, which decides when it ends."""


class Heartbeat:
    """The beating thread, and the monitor that listens."""

    def __init__(self, timeout_s: float, *, rank: int, directory: Path | None) -> None:
        """Args:
        timeout_s: how long this process may be without a sign of life; 0 starts no monitor.
        directory: RUN/hangs; None writes to stderr only.
        """
        self._stop = threading.Event()
        self._monitor: subprocess.Popen[bytes] | None = None
        if timeout_s == 0:
            return
        if directory is not None:  # what an earlier start died of
            _killed_file(directory, rank).unlink(missing_ok=True)
        stacks, self._stacks = os.pipe()
        faulthandler.register(heartbeat_monitor.DUMP_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        # By its path and isolated: no package, no site directory, nothing that could load torch or hang.
        command = [sys.executable, "-I", "-S", str(heartbeat_monitor.__file__)]
        where = str(directory.resolve()) if directory is not None else ""
        arguments = [str(rank), str(os.getpid()), str(timeout_s), str(stacks), where]
        # Blocked from the monitor's first moment on, as it inherits what is blocked here.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            pipe = subprocess.PIPE
            self._monitor = subprocess.Popen([*command, *arguments], stdin=pipe, bufsize=0, pass_fds=(stacks,))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(stacks)
        assert self._monitor.stdin is not None
        self._beats = self._monitor.stdin.fileno()
        os.set_blocking(self._beats, False)
        self._interval_s = min(_INTERVAL_S, timeout_s / 5)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the monitor. A second call does nothing."""
        if self._monitor is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        faulthandler.unregister(heartbeat_monitor.DUMP_SIGNAL)
        assert self._monitor.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self._beats, heartbeat_monitor.DONE)
        self._monitor.stdin.close()
        os.close(self._stacks)
        try:
            self._monitor.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._monitor.kill()
            self._monitor.wait()

    def _beat(self) -> None:
        """The thread."""
        while not self._stop.wait(self._interval_s):
            try:
                os.write(self._beats, b".")
            except BlockingIOError:  # the monitor is far behind; it has enough beats to read
                pass
            except OSError:
                logger.warning("The heartbeat monitor is gone: from here on nobody sees a stuck interpreter.")
                return


def killed_ranks(directory: Path | None) -> list[tuple[int, int, int, str]]:
    """(rank, process, exit code of the job, reason) of those that monitors have killed since these ranks started."""
    if directory is None:
        return []
    found = []
    for path in directory.glob("rank_*.killed.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(path.read_text())
            found.append((int(record["rank"]), int(record["pid"]), NODE_SUSPECTED, f"hang: {record['text']}"))
    return found


def _killed_file(directory: Path, rank: int) -> Path:
    return directory / f"rank_{rank}.killed.json"
