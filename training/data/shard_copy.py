"""The file of one cached shard: its data, then its URL, size and one CRC-32 per MiB.

NAME.shard     data | facts as JSON | length of the JSON, 8 bytes | magic
NAME.partial   being written; its writer holds a lock on it
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK_BYTES = 1 << 20
_MAGIC = b"shard-1\n"
_TAIL_BYTES = 8 + len(_MAGIC)


class CopyFacts(NamedTuple):
    """The end of a copy's file."""

    url: str
    size: int
    checksums: list[int]


def encode_facts(facts: CopyFacts) -> bytes:
    """What follows the data."""
    text = json.dumps(facts._asdict()).encode()
    return text + len(text).to_bytes(8, "little") + _MAGIC


class ShardCopy:
    """An open file of the cache, its facts read and found to be complete."""

    def __init__(self, path: Path, url: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        with closing_on_error(self._file):
            self.facts = self._read_facts()
            if self.facts.url != url:
                raise ValueError(f"it is of {self.facts.url!r}")

    def block(self, index: int) -> bytes:
        """One MiB. Raises ValueError: it is not as it was written."""
        start = index * BLOCK_BYTES
        data = os.pread(self._file.fileno(), min(BLOCK_BYTES, self.facts.size - start), start)
        if zlib.crc32(data) != self.facts.checksums[index]:
            raise ValueError(f"wrong checksum in the MiB at byte {start}")
        return data

    def close(self) -> None:
        self._file.close()

    def _read_facts(self) -> CopyFacts:
        end = os.fstat(self._file.fileno()).st_size
        tail = os.pread(self._file.fileno(), _TAIL_BYTES, max(0, end - _TAIL_BYTES))
        length = int.from_bytes(tail[:8], "little")
        if tail[8:] != _MAGIC or length + _TAIL_BYTES > end:
            raise ValueError("it is incomplete")
        facts = CopyFacts(**json.loads(os.pread(self._file.fileno(), length, end - _TAIL_BYTES - length)))
        blocks = -(-facts.size // BLOCK_BYTES)
        if facts.size + length + _TAIL_BYTES != end or len(facts.checksums) != blocks:
            raise ValueError("its size is wrong")
        return facts


def lock_partial(path: Path) -> BinaryIO | None:
    """An empty file that only this process writes; None if another one is at it."""
    file: BinaryIO = open(path, "a+b", buffering=BLOCK_BYTES)  # noqa: SIM115 - the caller closes it
    with closing_on_error(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have renamed or removed the file that we have opened.
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                return file
        except (BlockingIOError, FileNotFoundError):
            pass
    file.close()
    return None


def remove_if_abandoned(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True


@contextmanager
def closing_on_error(file: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
