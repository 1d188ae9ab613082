"""Reads webdataset samples from a tar stream, strictly: damage is an error with an offset, never a silent end.

    header (512 B, checksummed) | member data, padded to 512 B | header | ... | two zero blocks

Only regular files are returned; their names never touch the file system. Links, devices and directories are skipped.
Source: POSIX.1-2017 pax (ustar and pax headers) and GNU tar's long names and base-256 sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 1 << 30
_MAX_NAME_BYTES = 1 << 16
_REGULAR = frozenset(b"\x0007")
_ZERO_BLOCK = bytes(BLOCK_BYTES)


class TarError(ValueError):
    """A damaged or foreign tar; the message names the byte offset."""


class RawSample(NamedTuple):
    """One undecoded sample: the members that share a key, by lower-case extension (``jpg``, ``txt``, ``cls``)."""

    key: str
    members: dict[str, bytes]


def read_samples(stream: BinaryIO) -> Iterator[RawSample]:
    """Groups consecutive members with the same key (path up to the first dot of the base name) into samples.

    Raises:
        TarError: bad checksum, truncation, an oversized member, or a missing end of archive.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    for name, data in read_members(stream):
        member_key, extension = split_name(name)
        if not extension:
            continue
        # A repeated extension also starts a new sample: two neighbours that carry the same name are two samples.
        if member_key != key or extension in members:
            if key is not None and members:
                yield RawSample(key, members)
            key, members = member_key, {}
        members[extension] = data
    if key is not None and members:
        yield RawSample(key, members)


def split_name(name: str) -> tuple[str, str]:
    """``a/b.c/0001.seg.JPG`` -> (``a/b.c/0001``, ``seg.jpg``)."""
    directory, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}{slash}{stem}", extension.lower()


def read_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yields (name, data) of every regular file up to the end-of-archive mark."""
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = _read_exactly(stream, BLOCK_BYTES, offset=offset, what="a header")
        if header == _ZERO_BLOCK:
            _check_end(stream, offset=offset)
            return
        name, size, kind = _parse_header(header, offset=offset)
        if long_size is not None and kind in _REGULAR:
            size = long_size
        if size > MAX_MEMBER_BYTES:
            raise TarError(f"member {name!r} at byte {offset} claims {size} bytes, more than {MAX_MEMBER_BYTES}")
        padded = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        data = _read_exactly(stream, padded, offset=offset + BLOCK_BYTES, what=f"member {name!r}")[:size]
        if kind == ord("L"):
            long_name = data.rstrip(b"\x00").decode("utf-8", "surrogateescape")
        elif kind == ord("x"):
            long_name, long_size = _parse_pax(data, offset=offset)
        else:
            if kind in _REGULAR:
                yield (long_name or name), data
            long_name = long_size = None
        offset += BLOCK_BYTES + padded


def _read_exactly(stream: BinaryIO, count: int, *, offset: int, what: str) -> bytes:
    data = stream.read(count)
    while len(data) < count:
        more = stream.read(count - len(data))
        if not more:
            raise TarError(f"truncated at byte {offset + len(data)}, within {what}")
        data += more
    return data


def _check_end(stream: BinaryIO, *, offset: int) -> None:
    """One zero block has been read; a second must follow, or nothing at all (some writers stop there)."""
    rest = stream.read(BLOCK_BYTES)
    if rest and rest != _ZERO_BLOCK[: len(rest)]:
        raise TarError(f"data after the end-of-archive mark at byte {offset}")


def _parse_header(header: bytes, *, offset: int) -> tuple[str, int, int]:
    """(name, size in bytes, type flag) of a header block whose checksum is right."""
    try:
        stored = int(header[148:156].strip(b" \x00") or b"0", 8)
    except ValueError:
        raise TarError(f"no tar header at byte {offset}") from None
    if stored != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise TarError(f"header checksum mismatch at byte {offset}")
    name = header[:100].split(b"\x00", 1)[0]
    prefix = header[345:500].split(b"\x00", 1)[0] if header[257:263] == b"ustar\x00" else b""
    full_name = prefix + b"/" + name if prefix else name
    return full_name.decode("utf-8", "surrogateescape"), _parse_size(header[124:136], offset=offset), header[156]


def _parse_size(field: bytes, *, offset: int) -> int:
    if field[0] & 0x80:  # GNU base-256
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \x00") or b"0", 8)
    except ValueError:
        raise TarError(f"unreadable size in the header at byte {offset}") from None


def _parse_pax(data: bytes, *, offset: int) -> tuple[str | None, int | None]:
    """The path and size records of a pax header (``LENGTH KEY=VALUE\\n`` each)."""
    name: str | None = None
    size: int | None = None
    while data:
        length_text, _, _ = data.partition(b" ")
        if not length_text.isdigit() or not 0 < int(length_text) <= min(len(data), _MAX_NAME_BYTES):
            raise TarError(f"malformed pax record at byte {offset}")
        record, data = data[len(length_text) + 1 : int(length_text) - 1], data[int(length_text) :]
        field, _, value = record.partition(b"=")
        if field == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif field == b"size":
            size = int(value)
    return name, size
