"""Reads a JPEG's header as far as a device decoder must be able to rely on it, and leaves out what it does not need.

Of a sequential JPEG of one scan, which is what nearly all cameras and web servers send:

    start | APP0 | tables | frame | tables | scan ... | end        kept
    EXIF with its thumbnail, colour profile, comments, trailing bytes    left out: neither decoder may look at them

What such a decoder makes of other files depends on its version, so those are the host's to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import simplejpeg

from training.data.encoded_image import DecodedOnHost
from training.data.image_file import JPEG_SIGNATURE
from training.data.jpeg import JpegSize

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAME, _HUFFMAN, _SCAN, _QUANTIZATION, _RESTART = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD
_KEPT = (_FRAME, _HUFFMAN, _SCAN, _QUANTIZATION, _RESTART, 0xE0, 0xEE)
"""The last two say how colours were encoded: JFIF and Adobe."""
_OTHER_FRAMES = frozenset({*range(0xC1, 0xD0)} - {_HUFFMAN, 0xC8})
_SAMPLINGS = (b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")
"""4:4:4, 4:2:2 and 4:2:0: what every device decoder knows."""
_WHOLE_SPECTRUM = b"\x00\x3f\x00"


class BaselineJpeg(NamedTuple):
    """A file of this kind, cut down to what decides its pixels."""

    data: bytes
    size: JpegSize


def read_baseline(data: bytes) -> BaselineJpeg:
    """Checks the header (30 us) and that the file has an end; the coded pixels in between are not looked at.

    Raises:
        DecodedOnHost: ``not_jpeg``, ``other_jpeg`` (progressive, grey, CMYK, 12 bits, ...), ``damaged``.
    """
    if not data.startswith(JPEG_SIGNATURE):
        raise DecodedOnHost("not_jpeg")
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        raise DecodedOnHost("damaged") from None
    if colorspace != "YCbCr":
        raise DecodedOnHost("other_jpeg")
    return BaselineJpeg(_trim(data), JpegSize(height, width))


def _trim(data: bytes) -> bytes:
    parts, known = [_START], set[tuple[int, int]]()
    frame = b""
    for marker, begin, end in _segments(data):
        segment = data[begin:end]
        if marker in _OTHER_FRAMES:
            raise DecodedOnHost("other_jpeg")
        if marker == _FRAME:
            frame = segment
        elif marker == _QUANTIZATION:
            known.update((marker, table) for table in _quantization_tables(segment))
        elif marker == _HUFFMAN:
            known.update((marker, table) for table in _huffman_tables(segment))
        if marker in _KEPT:
            parts.append(segment)
    _check_scan(frame, segment, known)
    # Of a scan's bytes only restart marks look like markers.
    last = data.find(_END, end)
    if last < 0:
        raise DecodedOnHost("damaged")
    return b"".join((*parts, data[end : last + len(_END)]))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, end) of the segments up to the header of the first scan."""
    place, marker = len(_START), 0
    while marker != _SCAN:
        if data[place : place + 1] != b"\xff" or place + 4 > len(data):
            raise DecodedOnHost("damaged")
        marker = data[place + 1]
        if marker == 0xFF:  # markers may be padded with FF
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end < place + 4 or end > len(data):
            raise DecodedOnHost("damaged")
        yield marker, place, end
        place = end


def _quantization_tables(segment: bytes) -> Iterator[int]:
    place = 4
    while place < len(segment):
        yield segment[place] & 15
        place += 1 + 64 * (1 + (segment[place] >> 4))
    if place != len(segment):
        raise DecodedOnHost("damaged")


def _huffman_tables(segment: bytes) -> Iterator[int]:
    """Class and number of each table. Its codes must fit into their lengths, the code of all ones left over."""
    place = 4
    while place < len(segment):
        counts = segment[place + 1 : place + 17]
        if sum(count << (15 - bits) for bits, count in enumerate(counts)) >= 1 << 16:
            raise DecodedOnHost("damaged")
        yield segment[place]
        place += 17 + sum(counts)
    if place != len(segment):
        raise DecodedOnHost("damaged")


def _check_scan(frame: bytes, scan: bytes, known: set[tuple[int, int]]) -> None:
    """One scan of all three components, every table there."""
    if len(frame) != 19 or len(scan) != 14:
        raise DecodedOnHost("other_jpeg")
    if frame[4] != 8 or frame[11::3] not in _SAMPLINGS or scan[11:] != _WHOLE_SPECTRUM:
        raise DecodedOnHost("other_jpeg")
    if frame[10::3] != scan[5:11:2]:
        raise DecodedOnHost("other_jpeg")
    needed = {(_QUANTIZATION, table) for table in frame[12::3]}
    for tables in scan[6:12:2]:
        needed |= {(_HUFFMAN, tables >> 4), (_HUFFMAN, 16 | tables & 15)}
    if not needed <= known:
        raise DecodedOnHost("damaged")
