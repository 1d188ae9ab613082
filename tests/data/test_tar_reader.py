from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.factories import write_tar
from training.data.tar_reader import BLOCK_BYTES, RawSample, TarError, read_samples, split_name


def _tar(tmp_path: Path) -> bytes:
    samples = [(f"{i:04d}", {"jpg": bytes([i]) * 700, "txt": f"caption {i}".encode()}) for i in range(3)]
    return write_tar(tmp_path / "x.tar", samples).read_bytes()


def _read(data: bytes) -> list[RawSample]:
    return list(read_samples(io.BytesIO(data)))


def test_members_are_grouped_by_key(tmp_path: Path) -> None:
    samples = _read(_tar(tmp_path))
    assert [sample.key for sample in samples] == ["0000", "0001", "0002"]
    assert samples[1].members == {"jpg": b"\x01" * 700, "txt": b"caption 1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("0001.jpg", ("0001", "jpg")), ("a/b.c/0001.seg.JPG", ("a/b.c/0001", "seg.jpg")), ("README", ("README", ""))],
)
def test_names_split_at_the_first_dot_of_the_base_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_both_formats_are_read(format: int) -> None:
    buffer = io.BytesIO()
    name = "d" * 150 + "/" + "k" * 150 + ".txt"
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        info = tarfile.TarInfo(name)
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    assert _read(buffer.getvalue()) == [RawSample(name.removesuffix(".txt"), {"txt": b"hi"})]


def test_links_and_directories_are_skipped() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in [("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.CHRTYPE), ("c", tarfile.DIRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    assert _read(buffer.getvalue()) == []


@pytest.mark.parametrize("cut", [100, BLOCK_BYTES, BLOCK_BYTES + 300, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_truncation_anywhere_is_an_error_with_its_offset(tmp_path: Path, cut: int) -> None:
    with pytest.raises(TarError, match=f"truncated at byte {cut}"):
        _read(_tar(tmp_path)[:cut])


def test_a_flipped_bit_in_a_header_is_an_error(tmp_path: Path) -> None:
    data = bytearray(_tar(tmp_path))
    data[3 * BLOCK_BYTES + 2] ^= 1
    with pytest.raises(TarError, match=f"header checksum mismatch at byte {3 * BLOCK_BYTES}"):
        _read(bytes(data))


def test_a_foreign_file_is_an_error() -> None:
    with pytest.raises(TarError, match="not a tar at byte 0.*looks like HTML"):
        _read(b"<html>403 Forbidden</html>" * 100)


def test_data_after_the_end_mark_is_an_error(tmp_path: Path) -> None:
    data = _tar(tmp_path)
    with pytest.raises(TarError, match="data after the end-of-archive mark"):
        _read(
            data[: 9 * BLOCK_BYTES + 6 * BLOCK_BYTES].ljust(len(data), b"\x00")[: 15 * BLOCK_BYTES]
            + bytes(512)
            + b"x" * 512
        )


def test_an_oversized_member_is_refused_before_it_is_read() -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 8 << 30
    with pytest.raises(TarError, match="claims 8589934592 bytes"):
        _read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_two_neighbours_with_the_same_name_are_two_samples(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", [("a", {"txt": b"1"}), ("a", {"txt": b"2"})]).read_bytes()
    assert [sample.members["txt"] for sample in _read(data)] == [b"1", b"2"]


@pytest.mark.parametrize(
    "records",
    [
        b"9999",
        b"0 a=b\n",  # a length that leads nowhere must not be followed for ever
        b"1 a=b\n",
        b"00000 a=b\n",
        b"-6 a=b\n",
        b"6 ab\n6 a=b\n",
        b"7 a=b\n",
        b"6 a=bc\n",
        b"6 a=b",
        b" 6 a=b\n",
        b"a=b\n",
    ],
)
def test_a_malformed_pax_record_is_an_error(records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    info.size = len(records)
    with pytest.raises(TarError, match="malformed pax record at byte 0"):
        _read(info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\x00") + bytes(1024))
