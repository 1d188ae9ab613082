"""Parses the 512-byte headers of tar files, and refuses what is damaged, foreign or hostile. No input or output here.

    name 100 | mode, owner 24 | size 12 | time 12 | checksum 8 | kind 1 | link 100 | "ustar" 8 | ... | prefix 155 | pad

Source: POSIX.1-2017 pax (ustar and pax headers) and GNU tar's long names and base-256 sizes.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

BLOCK_BYTES = 512
MAX_PAX_BYTES = 1 << 20
MAX_NAME_BYTES = 1 << 16
_FOREIGN_STARTS = (
    (b"\x1f\x8b", "is compressed with gzip; decompress it, or read it through 'pipe:gzip -dc FILE'"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; decompress it, or read it through 'pipe:zstd -dc FILE'"),
    (b"\xfd7zXZ\x00", "is compressed with xz; decompress it, or read it through 'pipe:xz -dc FILE'"),
    (b"BZh", "is compressed with bzip2; decompress it, or read it through 'pipe:bzip2 -dc FILE'"),
    (b"PK\x03\x04", "is a zip archive, not a tar"),
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the real file with 'git lfs pull'"),
)
_MARKUP = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error|!--)", re.IGNORECASE)
_CHARACTER_SETS = (b"BINARY", b"ISO-IR 10646 2000 UTF-8")


class TarError(ValueError):
    """A damaged or foreign tar; ``offset`` is the byte where that shows, and the message names it."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset

    def __reduce__(self) -> tuple[type[TarError], tuple[str, int]]:
        return TarError, (str(self), self.offset)


class PaxRecords(NamedTuple):
    """What a pax header says about the member after it; None where it says nothing."""

    name: str | None
    size: int | None


def check_header(header: bytes, *, offset: int) -> None:
    """Verifies the checksum of a whole header block.

    Raises:
        TarError: it is wrong, or there is none; at byte 0 the message says what the file is instead, where that shows.
    """
    field = header[148:156]
    digits = field.strip(b" \x00")
    try:
        stored = int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        stored = -1
    # adler32's low half is 1 + the sum of the bytes, modulo 65521: exact as long as 512 bytes are below 128, and
    # twelve times as fast as sum().
    total = (zlib.adler32(header) & 0xFFFF) - 1 if header.isascii() else sum(header)
    if stored == total - sum(field) + 256:  # the checksum field itself counts as eight spaces
        return
    if offset == 0:
        refuse_foreign(header)
    if stored < 0:
        raise TarError(f"no tar header at byte {offset}", offset)
    if stored != _signed_sum(header):
        raise TarError(f"header checksum mismatch at byte {offset}", offset)


def _signed_sum(header: bytes) -> int:
    """The sum that some historical writers stored: bytes taken as signed."""
    body = header[:148] + header[156:]
    return sum(body) - 256 * sum(byte > 127 for byte in body) + 256


def refuse_foreign(start: bytes) -> None:
    """Raises a TarError with the remedy if a file that starts like this is a well-known other format."""
    for magic, what in _FOREIGN_STARTS:
        if start.startswith(magic):
            raise TarError(f"not a tar at byte 0: the file {what}", 0)
    if _MARKUP.match(start):
        first_words = start[:60].decode("utf-8", "replace").strip()
        raise TarError(f"not a tar at byte 0: the file looks like HTML or XML (an error page?): {first_words!r}", 0)


def parse_name(header: bytes) -> str:
    """The member's name, with ustar's prefix."""
    name = header[: header.find(b"\x00", 0, 100)] if header[99] == 0 else header[:100].partition(b"\x00")[0]
    if header[345] and header[257:263] == b"ustar\x00":
        name = header[345:500].partition(b"\x00")[0] + b"/" + name
    return decode_name(name)


def decode_name(name: bytes) -> str:
    """Text of any bytes; what is not UTF-8 is written as ``\\xff``, so that every name can be logged and printed."""
    return name.decode("utf-8", "backslashreplace")


def parse_size(header: bytes, *, offset: int) -> int:
    """The size field: octal digits, or GNU's base-256 for 8 GiB and more."""
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \x00")
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:  # an 8 or a 9
        pass
    if digits:  # signs and base-256 below zero among them
        raise TarError(f"unreadable size {field!r} in the header at byte {offset}", offset)
    return 0


def parse_long_name(data: bytes) -> str:
    """The name that a GNU long-name member carries."""
    return decode_name(data.partition(b"\x00")[0])


def parse_pax(data: bytes, *, offset: int) -> PaxRecords:
    """The path and size records of a pax header (``LENGTH KEY=VALUE\\n`` each).

    Raises:
        TarError: a malformed record, or one that changes how the data are to be read (sparse files, other encodings).
    """
    name: str | None = None
    size: int | None = None
    position = 0
    while position < len(data) and data[position]:  # a NUL ends the records
        digits = data[position : position + 8].partition(b" ")[0]
        start = position + len(digits) + 1
        end = position + (int(digits) if digits.isdigit() else 0)
        field, equals, value = data[start : max(start, end - 1)].partition(b"=")
        if not equals or end > len(data) or data[end - 1] != ord("\n"):
            raise TarError(f"malformed pax record at byte {offset}", offset)
        if field == b"path":
            name = decode_name(value)
        elif field == b"size":
            if not value.isdigit() or len(value) > 20:
                raise TarError(f"unreadable size {value[:40]!r} in the pax header at byte {offset}", offset)
            size = int(value)
        elif field.startswith(b"GNU.sparse."):
            raise TarError(f"sparse file at byte {offset}: write the shard without sparse files", offset)
        elif field == b"hdrcharset" and value not in _CHARACTER_SETS:
            raise TarError(f"unknown pax character set {value[:40]!r} at byte {offset}", offset)
        position = end
    return PaxRecords(name, size)
