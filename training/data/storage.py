"""Opens a shard as a stream of bytes: a local file, the output of a ``pipe:`` command, or any fsspec URL."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import fsspec

from training.data.shards import PIPE_PREFIX, is_local

_PIPE_BUFFER_BYTES = 1 << 20


class StorageError(RuntimeError):
    """Bytes that should be there could not be read; reading again may succeed."""


@contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """A readable binary stream of the shard. Leaving it early is fine: a command is then ended.

    Raises:
        StorageError: the file is missing, the command failed, or the connection broke.
    """
    if url.startswith(PIPE_PREFIX):
        with _open_pipe(url.removeprefix(PIPE_PREFIX)) as stream:
            yield stream
        return
    try:
        if is_local(url):
            with open(url, "rb") as stream:
                yield stream
        else:
            with fsspec.open(url, "rb") as remote:
                yield cast(BinaryIO, remote)
    except OSError as error:
        raise StorageError(f"Reading {url!r} failed: {error}") from error


@contextmanager
def _open_pipe(command: str) -> Iterator[BinaryIO]:
    """Runs ``command`` in a shell and yields its output; a non-zero exit after the last byte is an error."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=_PIPE_BUFFER_BYTES)
    assert process.stdout is not None
    try:
        yield cast(BinaryIO, process.stdout)
        finished = not process.stdout.read(1)
        status = process.wait() if finished else 0
    except BaseException:
        # What the reader saw (a short tar, say) is the symptom; the command's own failure is the cause.
        status = process.wait() if not process.stdout.read(1) else 0
        if status != 0:
            raise StorageError(f"Command {command!r} ended with status {status}: run it by hand to see why.") from None
        raise
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
    if status != 0:
        raise StorageError(f"Command {command!r} ended with status {status}: run it by hand to see why.")
