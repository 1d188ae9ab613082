"""Reads webdataset samples from a tar stream, strictly: damage is an error with an offset, never a silent end.

    header (512 B, checksummed) | member data, padded to 512 B | header | ... | two zero blocks

Only regular files are returned; their names never touch the file system. Links, devices and directories are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from training.data.tar_headers import (
    BLOCK_BYTES,
    MAX_NAME_BYTES,
    MAX_PAX_BYTES,
    TarError,
    check_header,
    parse_long_name,
    parse_name,
    parse_pax,
    parse_size,
    refuse_foreign,
)

__all__ = [
    "BLOCK_BYTES",
    "MAX_MEMBER_BYTES",
    "RawSample",
    "TarError",
    "TarMember",
    "read_members",
    "read_samples",
    "split_name",
]

MAX_MEMBER_BYTES = 1 << 30
_ONE_READ_BYTES = 1 << 15
_READ_OVER_BYTES = 1 << 12
"""Data up to here are read and dropped, which costs less than a skip."""
_DISCARD_BYTES = 1 << 20
_REGULAR = frozenset(b"\x0007")
_NO_DATA = frozenset(b"123456")
"""Links, devices, directories, FIFOs: whatever their size field says, no data follow (as in Python's tarfile)."""
_ZERO_BLOCK = bytes(BLOCK_BYTES)


class ByteStream(Protocol):
    """What is read from. A ``skip(n)`` method is used where there is one; otherwise bytes are read and dropped."""

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        ...


class RawSample(NamedTuple):
    """One undecoded sample: the members that share a key, by lower-case extension (``jpg``, ``txt``, ``cls``)."""

    key: str
    members: dict[str, bytes]
    offset: int = 0
    """Absolute byte of the sample's first header (a long-name or pax header included): reading may begin here."""


class TarMember(NamedTuple):
    """A regular file in a tar. ``offset`` is the byte of its first header, ``data_offset`` that of its data."""

    name: str
    data: bytes
    offset: int
    data_offset: int


def read_samples(
    stream: ByteStream,
    *,
    offset: int = 0,
    keep: Callable[[int], bool] | None = None,
    first_index: int = 0,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[RawSample]:
    """Groups consecutive members with the same key (path up to the first dot of the base name) into samples.

    A sample is yielded once the next key, or the end of the archive, proves it whole: damage costs the sample it cuts.
    A repeated extension also starts a new sample: two neighbours that carry the same name are two samples.

    Args:
        stream: positioned at absolute byte ``offset``.
        offset: the beginning of the archive, or the ``offset`` of one of its samples.
        keep: of an index, whether the sample is wanted; called once per sample, in order. Others are skipped, not read.
        first_index: the index of the first sample read.
        max_member_bytes: larger members, and samples of more bytes in all, are refused before they are read.

    Raises:
        TarError: bad checksum, truncation, an oversized member, or a missing end of archive.
    """
    walker = _Walker(stream, offset=offset, max_member_bytes=max_member_bytes)
    index = first_index - 1
    key: str | None = None
    start = total = 0
    wanted = False
    members: dict[str, bytes] = {}
    while walker.next_file():
        member_key, extension = split_name(walker.name)
        if not extension:
            continue
        if member_key != key or extension in members:
            if wanted:
                yield RawSample(str(key), members, start)
            key, members, start, total = member_key, {}, walker.offset, 0
            index += 1
            wanted = keep is None or keep(index)
        total += walker.size
        if total > max_member_bytes:
            raise TarError(f"sample {key!r} at byte {start} holds more than {max_member_bytes} bytes", start)
        members[extension] = walker.read_data() if wanted else b""
    if wanted:
        yield RawSample(str(key), members, start)


def read_members(stream: ByteStream, *, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[TarMember]:
    """Yields every regular file up to the end-of-archive mark."""
    walker = _Walker(stream, offset=0, max_member_bytes=max_member_bytes)
    while walker.next_file():
        offset, data_offset = walker.offset, walker.data_offset
        yield TarMember(walker.name, walker.read_data(), offset, data_offset)


def split_name(name: str) -> tuple[str, str]:
    """``a/b.c/0001.seg.JPG`` -> (``a/b.c/0001``, ``seg.jpg``); hidden files (``._0001.jpg``) have no extension."""
    directory, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}{slash}{stem}", extension.lower() if stem else ""


class _Walker:
    """Moves from regular file to regular file; of each, the data may be read once, or are skipped."""

    def __init__(self, stream: ByteStream, *, offset: int, max_member_bytes: int) -> None:
        self.name = ""
        self.size = 0
        self.offset = self.data_offset = offset
        self._read = stream.read
        self._skip: Callable[[int], object] = getattr(stream, "skip", self._discard)
        self._max_member_bytes = max_member_bytes
        self._next = offset  # absolute byte of the next header
        self._header = b""  # that header, if it came with the data before it
        self._unread = 0  # bytes of data, padded, between the stream's position and the next header

    def next_file(self) -> bool:
        """Moves to the next regular file and sets name, size and offsets; False at the end of the archive."""
        start = self._next
        name: str | None = None
        size: int | None = None
        while True:
            at = self._next
            header = self._take_header()
            if header == _ZERO_BLOCK:
                if start != at:
                    raise TarError(f"the archive ends at byte {at} after a header that announces a member", at)
                self._check_end(at + BLOCK_BYTES)
                return False
            check_header(header, offset=at)
            kind = header[156]
            self.size = parse_size(header, offset=at)
            if kind in _REGULAR:
                self.name = parse_name(header) if name is None else name
                if size is not None:
                    self.size = size
                self._announce(at)
                self.offset = start
                return True
            if kind == ord("g"):
                self._check_global(self._read_extension(kind, at), at)
                start = self._next
            elif kind in b"LKxX":
                data = self._read_extension(kind, at)
                if kind == ord("L"):
                    name = parse_long_name(data)
                elif kind != ord("K"):
                    records = parse_pax(data, offset=at)
                    name, size = records.name or name, records.size
            else:
                self._pass_over(kind, at, size)
                start, name, size = self._next, None, None

    def read_data(self) -> bytes:
        """The data of the file moved to, read together with the header after them."""
        size, padded = self.size, self._unread
        self._unread = 0
        if size > _ONE_READ_BYTES:  # two reads cost less than cutting a large block in two
            data = self._read_up_to(size)
            rest = self._read_up_to(padded - size + BLOCK_BYTES)
            got = len(data) + len(rest)
            self._header = rest[padded - size :]
        else:
            block = self._read_up_to(padded + BLOCK_BYTES)
            got = len(block)
            data = block[:size]
            self._header = block[padded:]
        if got < padded:
            end = self.data_offset + got
            raise TarError(f"truncated at byte {end}, within member {self.name!r}", end)
        return data

    def _announce(self, at: int) -> None:
        """Data of ``self.size`` bytes follow the header at byte ``at``."""
        if self.size > self._max_member_bytes:
            raise TarError(
                f"member {self.name!r} at byte {at} claims {self.size} bytes, more than {self._max_member_bytes}", at
            )
        self.data_offset = at + BLOCK_BYTES
        self._unread = (self.size + BLOCK_BYTES - 1) & -BLOCK_BYTES
        self._next = self.data_offset + self._unread

    def _read_extension(self, kind: int, at: int) -> bytes:
        """The data of a header that speaks about other members: a long name or pax records."""
        self.name = f"header of type {chr(kind)!r}"
        limit = MAX_NAME_BYTES if kind in b"LK" else MAX_PAX_BYTES
        if self.size > limit:
            raise TarError(f"{self.name} at byte {at} claims {self.size} bytes, more than {limit}", at)
        self._announce(at)
        return self.read_data()

    def _check_global(self, data: bytes, at: int) -> None:
        """Comments and times for all members are ignored; a name or size for all of them cannot be meant."""
        if any(value is not None for value in parse_pax(data, offset=at)):
            raise TarError(f"global pax header at byte {at} sets path or size", at)

    def _pass_over(self, kind: int, at: int, size: int | None) -> None:
        if kind in b"SM":
            what = "sparse file" if kind == ord("S") else "part of a file that began on another volume"
            raise TarError(f"{what} at byte {at}: write the shard without", at)
        self.name = f"of type {chr(kind)!r}"
        self.size = 0 if kind in _NO_DATA else self.size if size is None else size
        self._announce(at)

    def _take_header(self) -> bytes:
        if self._unread > _READ_OVER_BYTES:
            self._skip(self._unread)
        elif self._unread:
            self.read_data()
        header = self._header
        if len(header) < BLOCK_BYTES:
            header += self._read_up_to(BLOCK_BYTES - len(header))
            if len(header) < BLOCK_BYTES:
                self._refuse_short(header)
        self._header = b""
        self._unread = 0
        return header

    def _refuse_short(self, header: bytes) -> None:
        if self._next == 0:
            if not header:
                raise TarError("empty file: 0 bytes, at byte 0", 0)
            refuse_foreign(header)
        end = self._next + len(header)
        if header:
            raise TarError(f"truncated at byte {end}, within a header", end)
        # After a skip the stream may have ended anywhere within what was skipped.
        place = "at or before byte" if self._unread else "at byte"
        raise TarError(f"truncated {place} {end}, where a header or the end-of-archive mark should be", end)

    def _check_end(self, position: int) -> None:
        """One zero block has been read: a second must follow, or nothing (some writers stop there); then only zeros."""
        while block := self._read(_DISCARD_BYTES):
            rest = block.lstrip(b"\x00")
            if rest:
                at = position + len(block) - len(rest)
                raise TarError(f"data after the end-of-archive mark at byte {at}", at)
            position += len(block)

    def _read_up_to(self, count: int) -> bytes:
        """``count`` bytes, fewer only at the end of the stream (a raw pipe may return fewer at any time)."""
        data = self._read(count)
        while len(data) < count:
            more = self._read(count - len(data))
            if not more:
                break
            data += more
        return data

    def _discard(self, count: int) -> None:
        while count > 0:
            data = self._read(min(count, _DISCARD_BYTES))
            if not data:
                return
            count -= len(data)
