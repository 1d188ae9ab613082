"""Streams that go on after a break: by seeking in a file that is opened again, or by dropping what had come already."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

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


def _size_of(file: Any) -> int | None:
    """Of an open file, if it knows."""
    try:
        return os.fstat(file.fileno()).st_size
    except (AttributeError, OSError):
        size = getattr(file, "size", None)
        return size if isinstance(size, int) else None
