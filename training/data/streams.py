"""Streams of bytes that need no client of ours: a file, a command's output, whatever fsspec opens."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from typing import Any, BinaryIO, cast

from training.data.storage_errors import AccessDenied, Patience, RetryOptions, ShardMissing

_BUFFER_BYTES = 1 << 20
_SHOWN_STDERR = 400


class FileStream:
    """A local file."""

    def __init__(self, path: str, offset: int = 0, *, counters: Counter[str]) -> None:
        try:
            self._file = open(path, "rb", buffering=_BUFFER_BYTES)  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise ShardMissing(f"File {path!r} does not exist: correct --train-data.") from None
        except OSError as error:
            raise AccessDenied(f"File {path!r} cannot be read ({error.strerror}): correct its permissions.") from error
        self.size: int | None = os.fstat(self._file.fileno()).st_size
        self.offset = offset
        self._counters = counters
        if offset:
            self._file.seek(offset)

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        data = self._file.read(size)
        self.offset += len(data)
        self._counters["bytes_read"] += len(data)
        return data

    def skip(self, size: int, /) -> None:
        """Seeks."""
        self._file.seek(size, os.SEEK_CUR)
        self.offset += size

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class PipeStream:
    """The output of a shell command. A command that fails is run again, and its first bytes are dropped.

    A command that itself starts over within one output (``curl --retry``) repeats bytes without an error: leave retries
    to this class.
    """

    size: int | None = None

    def __init__(self, command: str, offset: int, *, options: RetryOptions, counters: Counter[str]) -> None:
        self._command = command
        self._counters = counters
        self._patience = Patience(options, counters=counters)
        self.offset = offset
        self._ended = False
        self._start()

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only when the command has ended well."""
        parts = []
        while size and not self._ended:
            data = cast(BinaryIO, self._process.stdout).read(size)
            parts.append(data)
            size -= len(data)
            self.offset += len(data)
            self._counters["bytes_read"] += len(data)
            if data:
                self._patience.progress()
            if size:
                self._finish()
        return b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Reads and drops."""
        while size and (data := self.read(min(size, _BUFFER_BYTES))):
            size -= len(data)

    def close(self) -> None:
        """Ends the command, wherever it is."""
        cast(BinaryIO, self._process.stdout).close()
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def _start(self) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); a pipe could fill up
        self._process = subprocess.Popen(
            self._command, shell=True, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=_BUFFER_BYTES
        )
        unread = self.offset
        while unread and (data := cast(BinaryIO, self._process.stdout).read(min(unread, _BUFFER_BYTES))):
            unread -= len(data)

    def _finish(self) -> None:
        status = self._process.wait()
        if status == 0:
            self._ended = True
            return
        self._stderr.seek(0)
        said = self._stderr.read()[-_SHOWN_STDERR:].decode(errors="replace").strip()
        self.close()
        try:
            self._patience.failed(f"Command {self._command!r}", f"it ended with status {status}: {said or 'no output'}.")
        finally:
            self._start()


class FsspecStream:
    """A file of any other protocol, through fsspec. What breaks off is opened again at the byte reached."""

    def __init__(self, url: str, offset: int, *, options: RetryOptions, counters: Counter[str]) -> None:
        self._url = url
        self._counters = counters
        self._patience = Patience(options, counters=counters)
        self.offset = offset
        self._file = self._reopen()
        self.size: int | None = getattr(self._file, "size", None)

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        while True:
            try:
                data = bytes(self._file.read(size))
                break
            except Exception as error:  # fsspec's protocols raise what their libraries raise
                self._patience.failed(f"Reading {self._url!r} at byte {self.offset}", f"{type(error).__name__}: {error}.")
                self._file = self._reopen()
        self._patience.progress()
        self.offset += len(data)
        self._counters["bytes_read"] += len(data)
        return data

    def skip(self, size: int, /) -> None:
        """Seeks."""
        self.offset += size
        self._file.seek(self.offset)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _reopen(self) -> Any:
        # Only here: fsspec and its protocols are slow to import, and few workers need them.
        import fsspec

        while True:
            try:
                file = fsspec.open(self._url, "rb").open()
                if self.offset:
                    file.seek(self.offset)
                return file
            except FileNotFoundError:
                raise ShardMissing(f"{self._url!r} does not exist: correct --train-data.") from None
            except PermissionError as error:
                raise AccessDenied(f"{self._url!r} may not be read ({error}): check the credentials.") from error
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self._url!r} cannot be opened: {error}") from error
            except Exception as error:
                self._patience.failed(f"Opening {self._url!r}", f"{type(error).__name__}: {error}.")
