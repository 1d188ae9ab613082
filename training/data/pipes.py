"""Reads the output of a shell command: what it says when it fails, how it is ended, when it counts as hanging."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import BinaryIO, Protocol, cast

from training.data.storage_errors import AccessDenied, RetryOptions, ShardMissing, StorageCounters, Transient
from training.data.streams import RestartedStream

_BUFFER_BYTES = 1 << 20
_SHOWN_STDERR = 400
_NOT_RUNNABLE = (126, 127)
_EXIT_POLL_S = 0.002
_PIPE_ATTEMPTS = 4
"""A command is dear to start, and most that fail once will fail again in a way that they cannot tell us."""
# What aws, curl, gsutil and cat say. A number alone may be part of a name.
_DENIED = re.compile(
    r"AccessDenied|ExpiredToken|InvalidAccessKeyId|SignatureDoesNotMatch|[Uu]nable to locate credentials|"
    r"Partial credentials|profile \(.*\) could not be found|\(403\)|error: 40[13]\b|Permission denied"
)
_MISSING = re.compile(r"NoSuchKey|NoSuchBucket|\(404\)|error: 404\b|No such file or directory|No URLs matched")


class PipeOptions(RetryOptions, Protocol):
    """The part of ``StorageOptions`` that a pipe needs."""

    @property
    def pipe_timeout_s(self) -> float: ...


def pipe_stream(command: str, offset: int, *, options: PipeOptions, counters: StorageCounters) -> RestartedStream:
    """The output of a shell command.

    A command that itself starts over within one output (``curl --retry``) repeats bytes without an error: retries must
    be left to us.
    """
    return RestartedStream(
        f"Command {command!r}",
        offset,
        start=lambda: _Command(command, timeout_s=options.pipe_timeout_s),
        options=options,
        counters=counters,
        attempts=min(_PIPE_ATTEMPTS, options.attempts),
    )


class _Command:
    """A running shell command, with all that it starts in a process group of its own."""

    def __init__(self, command: str, *, timeout_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._buffer = memoryview(b"")
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); a pipe for it could fill up
        self._process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0, process_group=0
        )
        self._stdout = cast(BinaryIO, self._process.stdout)
        self._output = self._stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        with suppress(OSError):  # 64 kB otherwise; refused where too many pipes are large already
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _BUFFER_BYTES)

    def read(self, size: int, /) -> bytes:
        if not self._buffer:
            self._buffer = memoryview(self._fill())
        data = bytes(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return data

    def close(self) -> None:
        # The shell has not been waited for yet, so its process group is nobody else's.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._stdout.close()
        self._process.wait()
        self._stderr.close()

    def _fill(self) -> bytes:
        if not self._poll.poll(1000 * self._timeout_s):
            raise Transient(f"no output for {self._timeout_s:.0f} s")
        data = os.read(self._output, _BUFFER_BYTES)
        if not data:
            self._check_status()
        return data

    def _check_status(self) -> None:
        """What the end of the output means.

        Raises:
            ShardMissing, AccessDenied: by what the command said. ValueError: there is no such command. Transient.
        """
        status = self._exit_status()
        if status == 0:
            return
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - _SHOWN_STDERR))
        said = self._stderr.read().decode(errors="replace").strip()
        failure = f"ended with status {status}: {said or 'no message, run it by hand to see why'}"
        if status in _NOT_RUNNABLE:
            raise ValueError(f"Command {self._command!r} {failure}. Install the command, or correct its name.")
        if _DENIED.search(said):
            raise AccessDenied(f"Command {self._command!r} {failure}. Check the credentials and permissions.")
        if _MISSING.search(said):
            raise ShardMissing(f"Command {self._command!r} {failure}. Correct the name.")
        raise Transient(f"it {failure}")

    def _exit_status(self) -> int:
        """Leaves the shell unreaped: until close, its number and its group's can be given to no other process."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            time.sleep(_EXIT_POLL_S)
        raise Transient("it did not end after its output")
