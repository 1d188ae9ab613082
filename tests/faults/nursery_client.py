"""The other end of ``nursery.py``: ranks without the seconds in which each would import torch."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class Nursery:
    """The other end of ``nursery.py``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv: Sequence[str], *, environment: Mapping[str, str], log: Path) -> int:
        """Process number of a new rank."""
        return int(self._ask({"argv": list(argv), "environment": dict(environment), "log": str(log)})["pid"])

    def poll(self, pid: int) -> int | None:
        """Exit code of a rank; None while it runs."""
        code = self._ask({"poll": pid})["code"]
        return None if code is None else int(code)

    def close(self) -> None:
        """Ends it, and with it all ranks that still run."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Rank:
    """A process of a nursery, to be treated as one of ``subprocess``."""

    def __init__(self, nursery: Nursery, argv: Sequence[str], *, environment: Mapping[str, str]) -> None:
        descriptor, name = tempfile.mkstemp(prefix="rank-", suffix=".log")
        os.close(descriptor)
        self._log = Path(name)
        self._nursery = nursery
        self.pid = nursery.start(argv, environment=environment, log=self._log)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self.returncode = self._nursery.poll(self.pid)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """If it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, None]:
        """All that it has written, after its end.

        Raises:
            subprocess.TimeoutExpired: it does not end.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        text = self._log.read_text(errors="replace")
        self._log.unlink()
        return text, None


@contextlib.contextmanager
def open_nursery() -> Iterator[Nursery]:
    """A nursery, closed at the end."""
    nursery = Nursery()
    try:
        yield nursery
    finally:
        nursery.close()


@cache
def shared_nursery() -> Nursery:
    """One for all tests of this process; it ends with it."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery
