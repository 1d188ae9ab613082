"""Streams of bytes that need no client of ours: a file, whatever fsspec opens, a command's output."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Protocol, cast

from training.data.storage_errors import (
    AccessDenied,
    Patience,
    RetryOptions,
    ShardChanged,
    ShardMissing,
    StorageCounters,
    Transient,
)

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


class SeekableStream:
    """A file opened by ``reopen``. Where reading fails, it is opened again at the byte reached."""

    def __init__(
        self, url: str, offset: int, *, reopen: Callable[[], Any], options: RetryOptions, counters: StorageCounters
    ) -> None:
        self._url = url
        self._reopen = reopen
        self._counters = counters
        self._patience = Patience(options, counters=counters)
        self._file: Any = None
        self.offset = offset
        self.size: int | None = _size_of(self._opened())

    def read(self, size: int, /) -> bytes:
        """``size`` bytes; fewer only at the end."""
        while True:
            file = self._opened()
            try:
                data = bytes(file.read(size))
                break
            except Exception as error:  # fsspec's protocols raise what their libraries raise
                self.close()
                self._failed(error)
        self._patience.progress(len(data))
        self.offset += len(data)
        self._counters.add("bytes_read", len(data))
        return data

    def skip(self, size: int, /) -> None:
        """Seeks."""
        self.offset += size
        if self._file is not None:
            self._file.seek(size, os.SEEK_CUR)

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # nothing was written, so nothing can be lost
                file.close()

    def _opened(self) -> Any:
        while self._file is None:
            try:
                file = self._reopen()
                if self.offset:
                    file.seek(self.offset)
                self._file = file
            except Exception as error:
                self._failed(error)
        return self._file

    def _failed(self, error: Exception) -> None:
        """Waits, or raises what waiting does not mend."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ShardMissing(f"{self._url!r} does not exist: correct its name.") from error
        if isinstance(error, PermissionError):
            raise AccessDenied(
                f"{self._url!r} may not be read ({error.strerror or error}): check its permissions or the credentials."
            ) from error
        if isinstance(error, ImportError | ValueError | IsADirectoryError):
            raise ValueError(f"{self._url!r} cannot be opened: {error}") from error
        cause = f"{type(error).__name__}: {error}"
        time.sleep(self._patience.failed(f"Reading {self._url!r} at byte {self.offset}", cause))


def file_stream(path: str, offset: int, *, options: RetryOptions, counters: StorageCounters) -> SeekableStream:
    """A local file."""

    def reopen() -> BinaryIO:
        return open(path, "rb", buffering=_BUFFER_BYTES)

    return SeekableStream(path, offset, reopen=reopen, options=options, counters=counters)


def fsspec_stream(url: str, offset: int, *, options: RetryOptions, counters: StorageCounters) -> SeekableStream:
    """A file of any protocol that fsspec knows."""

    def reopen() -> Any:
        # Only here: fsspec and its protocols are slow to import, and few workers need them.
        import fsspec

        return fsspec.open(url, "rb").open()

    return SeekableStream(url, offset, reopen=reopen, options=options, counters=counters)


class Source(Protocol):
    """Bytes that come in order, from the first one."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes, none at the end. Raises Transient where it breaks off."""

    def close(self) -> None:
        """Ends it, wherever it is."""


class RestartedStream:
    """Bytes of a source that cannot seek. After a break it is started again, and what had come already is dropped."""

    def __init__(
        self,
        what: str,
        offset: int,
        *,
        start: Callable[[], Source],
        options: RetryOptions,
        counters: StorageCounters,
        attempts: int | None = None,
    ) -> None:
        self._what = what
        self._start = start
        self._counters = counters
        self._patience = Patience(options, counters=counters, attempts=attempts)
        self._source: Source | None = None
        self._position = 0  # of the source; the stream's own is ``offset``
        self.offset = offset
        self.size: int | None = None

    def read(self, size: int, /) -> bytes:
        """``size`` bytes; fewer only at the end of a source that ended well."""
        parts = []
        while size > 0:
            try:
                data = self._next(size)
            except Transient as error:
                self.close()
                time.sleep(self._patience.failed(self._what, error))
                continue
            if not data:
                break
            parts.append(data)
            size -= len(data)
            self.offset += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Reads and drops."""
        while size > 0 and (data := self.read(min(size, _BUFFER_BYTES))):
            size -= len(data)

    def close(self) -> None:
        """Ends the source."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _next(self, size: int) -> bytes:
        if self._source is None:
            self._source, self._position = self._start(), 0
        while self._position < self.offset:
            if not self._take(min(_BUFFER_BYTES, self.offset - self._position)):
                raise ShardChanged(
                    f"{self._what}: it ended at byte {self._position}, and {self.offset} bytes had been read from it "
                    "before. Do not overwrite shards during a run."
                )
        data = self._take(size)
        self._patience.progress(len(data))
        return data

    def _take(self, size: int) -> bytes:
        assert self._source is not None
        data = self._source.read(size)
        self._position += len(data)
        self._counters.add("bytes_read", len(data))
        return data


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
        """Leaves the shell unreaped: its number, and so its group's, cannot be given to another process before close."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            time.sleep(_EXIT_POLL_S)
        raise Transient("it did not end after its output")


def _size_of(file: Any) -> int | None:
    """Of an open file, if it knows."""
    try:
        return os.fstat(file.fileno()).st_size
    except (AttributeError, OSError):
        size = getattr(file, "size", None)
        return size if isinstance(size, int) else None
