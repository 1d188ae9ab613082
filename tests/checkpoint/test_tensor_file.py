from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.tensor_file import Piece, TensorReader, map_tensors, read_entries, write_tensors, write_text

TENSORS = {
    "matrix": torch.randn(3, 4),
    "transposed": torch.randn(4, 3).T,
    "half": torch.randn(5).half(),
    "brain": torch.randn(5).bfloat16(),
    "number": torch.tensor(7.0),
    "none": torch.zeros(0, 5, dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", TENSORS)
    read = load_file(tmp_path / "x")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in read)


def test_what_the_library_writes_is_read_here(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "x", metadata={"a": "b"})
    read = map_tensors(tmp_path / "x")
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with TensorReader(tmp_path / "x") as reader:
        assert {entry.name for entry, tensor in reader if torch.equal(tensor, TENSORS[entry.name])} == set(TENSORS)


def test_size_and_hash_are_those_of_the_file_for_writer_and_reader(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "x", TENSORS)
    data = (tmp_path / "x").read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    with TensorReader(tmp_path / "x") as reader:
        assert len(list(reader)) == len(TENSORS)
        assert reader.facts() == written
    assert write_text(tmp_path / "y", "å") == (2, hashlib.sha256("å".encode()).hexdigest())


def test_rows_of_a_tensor_say_where_they_belong_and_the_library_reads_them(tmp_path: Path) -> None:
    rows, column = torch.randn(2, 3), torch.randn(4, 1)
    write_tensors(tmp_path / "x", {"rows": rows, "column": column}, {"rows": Piece((7, 3), 4)})
    entries = {entry.name: entry for entry in read_entries(tmp_path / "x")}
    assert (entries["rows"].full_shape, entries["rows"].row, entries["rows"].is_whole) == ((7, 3), 4, False)
    assert (entries["column"].full_shape, entries["column"].row, entries["column"].is_whole) == ((4, 1), 0, True)
    assert torch.equal(load_file(tmp_path / "x")["rows"], rows)


def test_a_file_without_tensors_is_read_too(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "x", {})
    assert map_tensors(tmp_path / "x") == {}
    with TensorReader(tmp_path / "x") as reader:
        assert (list(reader), reader.facts()) == ([], written)


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})


def test_a_type_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'z' is of torch.complex64, which the format has no name for"):
        write_tensors(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex64)})


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start: int, end: int, *, dtype: str = "U8", shape: list[object] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def _pieces(pieces: object) -> dict[str, object]:
    return {"a": _entry(0, 4), "__metadata__": {"pieces": json.dumps(pieces)}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 7 + b"\x7f" + b"{}", "claims a header of 9223372036854775807 bytes in a file of 10"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "claims a header of 1099511627776 bytes"),
        (b"\x02\x00", "ends 6 bytes too early"),
        (b"", "ends 8 bytes too early"),
        (_file(b"{no json"), "has no valid header"),
        (_file(b"[" * 90_000), "has no valid header"),
        (_file([1]), "has no valid header"),
        (_file({"a": 3}), "has no valid header"),
        (_file({"a": _entry(0, 4, dtype="F12")}, b"1234"), "has no valid header .*F12"),
        (_file({"a": _entry(0, 4, shape=[-2, -2])}, b"1234"), "has no valid header .*shape"),
        (_file({"a": _entry(0, 4, shape=[1 << 60])}, b"1234"), "has no valid header .*expected from 0"),
        (_file({"a": _entry(2, 4)}, b"1234"), "lies from 2 to 4, expected from 0"),
        (_file({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456"), "'b' lies from 2 to 6, expected from 4"),
        (_file({"a": _entry(0, 4)}, b"123456"), "data end at byte .* of"),
        (_file({"a": _entry(0, 40)}, b"123456"), "data end at byte .* of"),
        (
            _file(_pieces({"a": [[8], 5]}), b"1234"),
            r"has rows of shape \(4,\) from row 5 on, of a tensor of shape \(8,",
        ),
        (_file(_pieces({"a": [[8, 2], 0]}), b"1234"), r"has rows of shape \(4,\) from row 0 on"),
        (_file(_pieces({"a": [[], 0]}), b"1234"), r"has rows of shape \(4,\) from row 0 on"),
        (_file(_pieces({"a": [[8], -1]}), b"1234"), r"'a' is a piece of \[\[8\], -1\]"),
        (_file(_pieces({"a": [[8], True]}), b"1234"), "'a' is a piece of"),
        (_file(_pieces({"b": [[8], 0]}), b"1234"), "pieces of tensors that are not there, such as 'b'"),
        (_file(_pieces([3]), b"1234"), "has no valid header"),
        (_file({"a": _entry(0, 4), "__metadata__": {"pieces": "{"}}, b"1234"), "has no valid header"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    for read in (read_entries, map_tensors, TensorReader):
        with pytest.raises(DamagedCheckpoint, match=message):
            read(tmp_path / "x")


def test_a_file_that_ends_while_it_is_read_is_damage(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.zeros(100)})
    with TensorReader(tmp_path / "x") as reader:
        (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-100])
        with pytest.raises(DamagedCheckpoint, match="ends 100 bytes too early"):
            list(reader)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="x cannot be opened"):
        TensorReader(tmp_path / "x")
