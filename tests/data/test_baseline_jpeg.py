"""Which JPEGs a device may be trusted with, and what is left of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests.data.images import encode, render
from training.data.baseline_jpeg import read_baseline
from training.data.encoded_image import DecodedOnHost
from training.data.image_file import UnusableSample, decode_image

IMAGE = render(90, 70)
_DC_TABLE = b"\xff\xc4\x00\x1f\x00"


def _reason(data: bytes) -> str:
    with pytest.raises(DecodedOnHost) as caught:
        read_baseline(data)
    return caught.value.reason


@pytest.mark.parametrize("options", [{"subsampling": kind} for kind in (0, 1, 2)] + [{"restart_marker_blocks": 2}])
def test_a_file_without_metadata_is_kept_as_it_is(options: dict[str, int]) -> None:
    data = encode(IMAGE, **options)
    assert read_baseline(data) == (data, (70, 90))


def test_thumbnails_profiles_comments_and_trailing_bytes_are_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, encode(render(16, 16)).decode("latin-1")  # a JPEG within the JPEG
    described = encode(IMAGE, exif=exif, icc_profile=b"profile" * 40, comment=b"\xff\xd9 a comment \xff\xda")
    assert len(described) > len(encode(IMAGE)) + 500
    assert read_baseline(described + described).data == encode(IMAGE)
    first = described.index(b"\xff\xdb")
    assert read_baseline(described[:first] + b"\xff\xff" + described[first:]).data == encode(IMAGE)  # padded markers


def test_other_kinds_of_files_are_the_hosts() -> None:
    assert _reason(encode(IMAGE, "PNG")) == "not_jpeg"
    for mode in ("L", "CMYK"):
        assert _reason(encode(IMAGE.convert(mode))) == "other_jpeg"
    for options in ({"progressive": True}, {"keep_rgb": True}):
        assert _reason(encode(IMAGE, **options)) == "other_jpeg"
    frame = encode(IMAGE).index(b"\xff\xc0")
    data = bytearray(encode(IMAGE))
    data[frame + 11] = 0x41  # 4:1:1
    assert _reason(bytes(data)) == "other_jpeg"
    data[frame + 1], data[frame + 11] = 0xC1, 0x22  # extended sequential
    assert _reason(bytes(data)) == "other_jpeg"


def _without_segment(data: bytes, marker: bytes) -> bytes:
    begin = data.index(marker)
    return data[:begin] + data[begin + 2 + int.from_bytes(data[begin + 2 : begin + 4], "big") :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-2],
        lambda data: data[: len(data) // 2],
        lambda data: data[:300],
        lambda data: _without_segment(data, b"\xff\xdb"),
        lambda data: _without_segment(data, b"\xff\xc4"),
        lambda data: data.replace(_DC_TABLE, _DC_TABLE + b"\x03", 1),  # three codes of one bit
        lambda data: data.replace(b"\xff\xdb\x00\x43", b"\xff\xdb\x00\x44", 1),
    ],
    ids=["no end", "half", "half a header", "no quantization", "no Huffman", "impossible codes", "wrong length"],
)
def test_a_file_whose_header_or_end_is_missing_is_damaged(damage: Callable[[bytes], bytes]) -> None:
    assert _reason(damage(encode(IMAGE))) == "damaged"


def test_a_wrong_byte_in_the_header_never_makes_the_device_see_another_picture() -> None:
    data, rng = encode(IMAGE), random.Random(0)
    header = data.index(b"\xff\xda") + 14
    accepted = 0
    for _ in range(400):
        place = rng.randrange(2, header)
        damaged = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        try:
            jpeg = read_baseline(damaged)
        except DecodedOnHost:
            continue
        accepted += 1
        try:
            pixels = np.asarray(decode_image(jpeg.data))
        except UnusableSample:
            continue  # seldom, and told when it is decoded
        np.testing.assert_array_equal(pixels, np.asarray(decode_image(damaged)))
    assert accepted > 40
