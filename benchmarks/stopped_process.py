"""A process that answers requests, one JSON line each, and stands still with all it started in between.

    ask -> SIGCONT to the whole tree -> request on its standard input -> answer on its standard output -> SIGSTOP

So two programs can be measured in turn on one machine, neither in the other's way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, cast

from benchmarks.process_meter import process_tree
from benchmarks.provenance import ROOT


class StoppedProcess:
    """``python -m MODULE ARGUMENTS``; killed with all it started when the block that uses it ends."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        paths: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            paths: where it imports from before anything else.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What it answers.

        Raises:
            RuntimeError: it has ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            with suppress(BrokenPipeError):  # the answer that does not come says more
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            self._signal(signal.SIGSTOP)
        if not answer:
            self._signal(signal.SIGCONT)
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}: see what it printed.")
        return cast("dict[str, Any]", json.loads(answer))

    def _signal(self, number: int) -> None:
        for pid in process_tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
