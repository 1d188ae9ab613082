"""The reader against other writers' archives, every way to cut them, and hostile ones."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.tar_headers import BLOCK_BYTES, MAX_NAME_BYTES, MAX_PAX_BYTES
from training.data.tar_reader import RawSample, TarError, read_members, read_samples, split_name

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
Content = list[tuple[str, dict[str, bytes]]]

contents = st.lists(
    st.dictionaries(st.sampled_from(["jpg", "txt", "json", "seg.png"]), st.binary(max_size=1100), min_size=1),
    min_size=1,
    max_size=4,
)
formats = st.sampled_from(FORMATS)


def _info(name: str, *, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def _header(name: str, *, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    return _info(name, size=size, kind=kind, link=link).tobuf(tarfile.GNU_FORMAT)


def _member(name: str, data: bytes = b"x", *, kind: bytes = tarfile.REGTYPE) -> bytes:
    return _header(name, size=len(data), kind=kind) + data + bytes(-len(data) % BLOCK_BYTES)


def _pax(*records: str) -> bytes:
    data = b""
    for record in records:
        body = f" {record}\n".encode()
        length = len(body) + len(str(len(body)))
        length += len(str(length)) - len(str(len(body)))
        data += str(length).encode() + body
    return _member("pax", data, kind=tarfile.XHDTYPE)


END = bytes(2 * BLOCK_BYTES)


def _write(content: Content, *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for key, members in content:
            for extension, data in members.items():
                archive.addfile(_info(f"{key}.{extension}", size=len(data)), io.BytesIO(data))
    return buffer.getvalue()


def _keyed(samples: list[dict[str, bytes]]) -> Content:
    return [(f"dir/{index:03d}", members) for index, members in enumerate(samples)]


def _read(data: bytes) -> list[RawSample]:
    return list(read_samples(io.BytesIO(data)))


def _until_error(data: bytes) -> tuple[Content, TarError | None]:
    found: Content = []
    try:
        for sample in read_samples(io.BytesIO(data)):
            found.append((sample.key, sample.members))
    except TarError as error:
        return found, error
    return found, None


@settings(max_examples=40, deadline=None)
@given(contents, formats)
def test_every_format_of_tarfile_is_read_back_in_full(samples: list[dict[str, bytes]], format: int) -> None:
    content = _keyed(samples)
    assert _until_error(_write(content, format=format)) == (content, None)


@settings(max_examples=60, deadline=None)
@given(contents, formats, st.data())
def test_a_cut_anywhere_is_an_error_or_loses_nothing(
    samples: list[dict[str, bytes]], format: int, data: st.DataObject
) -> None:
    content = _keyed(samples)
    archive = _write(content, format=format)
    end = len(archive.rstrip(b"\x00")) // BLOCK_BYTES * BLOCK_BYTES
    cut = data.draw(st.integers(0, len(archive)) | st.integers(0, len(archive) // BLOCK_BYTES).map(lambda b: b * 512))
    found, error = _until_error(archive[:cut])
    if error is None:
        assert found == content
        assert cut > end
    else:
        # What was whole is delivered once and in order; the sample that the cut hit, or may have hit, is not.
        assert found == content[: len(found)]
        assert error.offset == cut
        assert f"byte {cut}" in str(error)
        starts = [sample.offset for sample in _read(archive)]
        whole = sum(start + BLOCK_BYTES <= cut for start in starts[1:])
        assert len(found) >= whole - (format != tarfile.USTAR_FORMAT)


@settings(max_examples=100, deadline=None)
@given(contents, formats, st.integers(0, 1 << 30), st.integers(1, 255))
def test_a_flipped_header_byte_is_an_error_or_changes_nothing(
    samples: list[dict[str, bytes]], format: int, place: int, flip: int
) -> None:
    content = _keyed(samples)
    archive = bytearray(_write(content, format=format))
    headers = [member.data_offset - BLOCK_BYTES for member in read_members(io.BytesIO(bytes(archive)))]
    archive[headers[place % len(headers)] + place // 7 % BLOCK_BYTES] ^= flip
    found, error = _until_error(bytes(archive))
    assert found == content[: len(found)]
    assert error is not None or found == content


@settings(max_examples=40, deadline=None)
@given(contents, formats, st.data())
def test_reading_from_a_samples_offset_gives_exactly_the_rest(
    samples: list[dict[str, bytes]], format: int, data: st.DataObject
) -> None:
    archive = _write(
        [("n" * 120 + "/" + "k" * 60 + "/" + key, members) for key, members in _keyed(samples)], format=format
    )
    everything = _read(archive)
    start = data.draw(st.integers(0, len(everything) - 1))
    offset = everything[start].offset
    assert list(read_samples(io.BytesIO(archive[offset:]), offset=offset)) == everything[start:]


class SkippingStream(io.BytesIO):
    """Counts what is read, and what is skipped without reading."""

    bytes_read = 0
    bytes_skipped = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.bytes_read += len(data)
        return data

    def skip(self, count: int) -> None:
        self.bytes_skipped += count
        self.seek(count, os.SEEK_CUR)


@settings(max_examples=40, deadline=None)
@given(contents, st.sets(st.integers(5, 9)), st.booleans())
def test_samples_that_are_not_kept_are_skipped_and_keep_their_index(
    samples: list[dict[str, bytes]], kept: set[int], skips: bool
) -> None:
    archive = _write(_keyed(samples))
    asked: list[int] = []

    def keep(index: int) -> bool:
        asked.append(index)
        return index in kept

    stream = SkippingStream(archive) if skips else io.BytesIO(archive)
    found = list(read_samples(stream, keep=keep, first_index=5))
    assert found == [sample for index, sample in enumerate(_read(archive), start=5) if index in kept]
    assert asked == list(range(5, 5 + len(samples)))


def test_the_data_of_unwanted_samples_are_not_read() -> None:
    stream = SkippingStream(_write([(str(index), {"jpg": bytes(100_000)}) for index in range(10)]))
    assert [sample.key for sample in read_samples(stream, keep=lambda index: index == 3)] == ["3"]
    assert stream.bytes_read < 130_000
    assert stream.bytes_skipped == 9 * 100_352


def test_a_cut_within_a_skipped_sample_is_an_error() -> None:
    archive = _write([("a", {"jpg": bytes(5000)})])
    with pytest.raises(TarError, match=r"truncated at or before byte 5632"):
        list(read_samples(SkippingStream(archive[:3000]), keep=lambda index: False))


def test_reading_need_not_return_all_bytes_at_once() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 100))

    content = _keyed([{"jpg": b"a" * 40_000, "txt": b"b"}, {"txt": b"c"}])
    found = [(sample.key, sample.members) for sample in read_samples(Trickle(_write(content)))]
    assert found == content


def test_webdatasets_own_writer_is_read_back(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        for index in range(5):
            sink.write({"__key__": f"{index:05d}", "jpg": bytes([index]) * 999, "txt": f"caption {index}"})
    found = _read((tmp_path / "x.tar").read_bytes())
    assert [sample.key for sample in found] == [f"{index:05d}" for index in range(5)]
    assert found[4].members == {"jpg": b"\x04" * 999, "txt": b"caption 4"}


def test_keys_are_those_that_webdataset_forms() -> None:
    names = ["a.jpg", "a/b.c/d.seg.JPG", "./a.jpg", "._a.jpg", "README", "a.", "../../a.txt", "/etc/a.txt"]
    for name in names:
        key, extension = webdataset.tariterators.base_plus_ext(name)
        assert split_name(name)[1] == (extension or "").lower()
        assert not extension or split_name(name)[0] == key


def test_old_tars_of_bytes_taken_as_signed_are_read() -> None:
    header = bytearray(_header("caf\u00e9.txt", size=1))
    body = header[:148] + header[156:]
    signed = sum(byte - 256 * (byte > 127) for byte in body) + 8 * ord(" ")
    header[148:156] = b"%06o\x00 " % signed
    assert _read(bytes(header) + b"x".ljust(512, b"\x00") + END)[0].key == "caf\u00e9"


def test_a_name_that_is_not_text_can_be_printed() -> None:
    header = bytearray(_header("a?.txt", size=1))
    header[1] = 0xFF
    header[148:156] = b"%06o\x00 " % (sum(header[:148]) + sum(header[156:]) + 256)
    assert _read(bytes(header) + b"x".ljust(512, b"\x00") + END)[0].key == "a\\xff"


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], ["a", "b"]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], ["a", "b", "a", "b"]),  # interleaved: every run is a sample of its own
        (["a.JPG", "a.Txt"], ["a"]),
        (["a.jpg", "a.JPG"], ["a", "a"]),  # repeated extension
        (["a/0.jpg", "b/0.jpg"], ["a/0", "b/0"]),
        (["a.jpg", "README", "._a.jpg", "d/.hidden", "a.txt"], ["a"]),  # files without key or extension divide nothing
    ],
)
def test_consecutive_members_of_one_key_are_a_sample(names: list[str], keys: list[str]) -> None:
    assert [sample.key for sample in _read(b"".join(_member(name) for name in names) + END)] == keys


def test_global_headers_and_long_links_are_passed_over() -> None:
    archive = _member("pax_global_header", b"18 comment=a word\n", kind=tarfile.XGLTYPE) + _member("a.txt")
    archive += _info("b", kind=tarfile.SYMTYPE, link="t" * 300).tobuf(tarfile.GNU_FORMAT) + _member("c.txt") + END
    samples = _read(archive)
    assert [(sample.key, sample.offset) for sample in samples] == [("a", 1024), ("c", 1024 + 1024 + 512 * 3)]


def test_nothing_but_regular_files_is_returned_or_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
    archive = b"".join(_header(f"{kind.decode()}.txt", size=700, kind=kind, link="/etc/passwd") for kind in kinds)
    archive += _member("../../escape.txt") + _member("/abs.txt") + _member("a.pyd", pickle.dumps(print)) + END
    assert [sample.key for sample in _read(archive)] == ["../../escape", "/abs", "a"]
    assert os.listdir(tmp_path) == []


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "npy", "pth", "ten", "json.gz"])
def test_members_are_never_decoded(extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Canary())
    assert _read(_member(f"a.{extension}", data) + END)[0].members == {extension: data}
    assert not os.path.exists("canary")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "empty file: 0 bytes"),
        (gzip.compress(_member("a.txt") + END, mtime=0), r"at byte 0: the file is compressed with gzip.*pipe:gzip -dc"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"\xfd7zXZ\x00", "compressed with xz"),
        (b"BZh9" + b"1" * 600, "compressed with bzip2"),
        (b"PK\x03\x04" + b"1" * 600, "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>403", "looks like HTML or XML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>' + b" " * 600, "looks like HTML or XML"),
        (_header("a.txt", size=8 << 30) + END, "claims 8589934592 bytes, more than 1073741824"),
        (_pax(f"size={1 << 62}") + _member("a.txt") + END, f"claims {1 << 62} bytes"),
        (_pax("size=-1") + _member("a.txt") + END, "unreadable size b'-1' in the pax header at byte 0"),
        (_header("x", size=MAX_PAX_BYTES + 1, kind=tarfile.XHDTYPE), r"type 'x' at byte 0 claims 1048577 bytes"),
        (_header("x", size=8 << 30, kind=tarfile.XGLTYPE), r"type 'g' at byte 0 claims 8589934592 bytes"),
        (_header("x", size=MAX_NAME_BYTES + 1, kind=tarfile.GNUTYPE_LONGNAME), "type 'L' at byte 0 claims 65537"),
        (_header("x", size=MAX_NAME_BYTES + 1, kind=tarfile.GNUTYPE_LONGLINK), "type 'K' at byte 0 claims 65537"),
        (_member("x", b"9 path=a\n", kind=tarfile.XGLTYPE) + END, "global pax header at byte 0 sets path or size"),
        (_pax("GNU.sparse.major=1") + _member("a.txt") + END, "sparse file at byte 0"),
        (_pax("hdrcharset=EBCDIC") + _member("a.txt") + END, "unknown pax character set b'EBCDIC'"),
        (_header("a.txt", kind=tarfile.GNUTYPE_SPARSE) + END, "sparse file at byte 0"),
        (_header("a.txt", kind=b"M") + END, "another volume at byte 0"),
        (_pax("path=a.txt") + END, "the archive ends at byte 1024 after a header that announces a member"),
        (_member("a.txt") + END + b"more", r"data after the end-of-archive mark at byte 2048"),
        (_member("a.txt") + bytes(512) + _member("b.txt") + END, r"data after the end-of-archive mark at byte 1536"),
        (bytes(20_000) + b"\x01", "data after the end-of-archive mark at byte 20000"),
    ],
)
def test_foreign_and_hostile_archives_are_refused_with_cause_and_byte(archive: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TarError, match=message):
            _read(archive)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # refused from the header, before any data are read
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "field", [b"-0000000001\x00", b"00000_00001\x00", b"00000000009\x00", b"\xff" * 12, b"1\x002".ljust(12)]
)
def test_a_size_that_is_no_octal_number_is_refused(field: bytes) -> None:
    header = bytearray(_header("a.txt"))
    header[124:136] = field
    header[148:156] = b"%06o\x00 " % (sum(header[:148]) + sum(header[156:]) + 256)
    with pytest.raises(TarError, match="unreadable size .* in the header at byte 0"):
        _read(bytes(header) + END)


def test_a_sample_of_endless_members_is_refused_within_the_cap() -> None:
    members = b"".join(_member(f"a.{index}", bytes(1000)) for index in range(20))
    with pytest.raises(TarError, match=r"sample 'a' at byte 0 holds more than 5000 bytes"):
        list(read_samples(io.BytesIO(members + END), max_member_bytes=5000))


@pytest.mark.parametrize("blocks", [1, 2, 3, 20])
def test_an_archive_of_zeros_is_empty(blocks: int) -> None:
    assert _read(bytes(blocks * BLOCK_BYTES)) == []


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TarError("truncated at byte 7", 7)))
    assert (str(error), error.offset) == ("truncated at byte 7", 7)


def test_no_header_reaches_sum_unless_it_is_not_ascii() -> None:
    """The fast checksum must be exact: all-127 bytes, the largest that it may see, do not wrap."""
    header = bytearray(b"\x7f" * BLOCK_BYTES)
    header[124:136] = b"00000000000\x00"
    header[148:156] = b"%06o\x00 " % (sum(header[:148]) + sum(header[156:]) + 256)
    with pytest.raises(TarError, match="truncated at byte 512"):  # past the checksum: an unknown kind, skipped
        _read(bytes(header))


def test_a_missing_block_anywhere_before_the_last_shows() -> None:
    content = _keyed([{"jpg": b"a" * 700, "txt": b"b"}] * 3)
    archive = _write(content)
    blocks = [archive[i : i + 512] for i in range(0, 15 * 512, 512)]
    for missing in range(14):
        _, error = _until_error(b"".join(block for i, block in enumerate(blocks) if i != missing) + END)
        assert error is not None


@settings(max_examples=200, deadline=None)
@given(contents, formats, st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=14)), max_size=3))
def test_headers_of_any_content_and_a_right_checksum_are_read_or_refused(
    samples: list[dict[str, bytes]], format: int, edits: list[tuple[int, bytes]]
) -> None:
    archive = bytearray(_write(_keyed(samples), format=format))
    headers = [member.data_offset - BLOCK_BYTES for member in read_members(io.BytesIO(bytes(archive)))]
    for place, data in edits:
        start = headers[place % len(headers)]
        field = start + [0, 100, 124, 156, 257, 345][place // 100 % 6]
        archive[field : field + len(data)] = data
        archive[start + 148 : start + 156] = b" " * 8
        archive[start + 148 : start + 156] = b"%06o\x00 " % sum(archive[start : start + BLOCK_BYTES])
    _until_error(bytes(archive))  # raises nothing but TarError


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789 =ab\n\x00", max_size=40))
def test_pax_records_of_any_content_are_read_or_refused(text: str) -> None:
    _until_error(_member("pax", text.encode(), kind=tarfile.XHDTYPE) + _member("a.txt") + END)
