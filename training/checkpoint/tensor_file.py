"""Reads and writes safetensors files as a stream: what is written or read is hashed on its way, never held twice.

    8 bytes: length of the header | header: JSON {NAME: {dtype, shape, data_offsets}} | data, tensor after tensor

The format is that of the safetensors library; its own writer takes all tensors at once and does not hash. Of a tensor
that lies in several files each holds some rows, one after another; the header's metadata says which:

    {"__metadata__": {"pieces": '{NAME: [[SHAPE OF THE WHOLE], FIRST ROW]}'}, ...}

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.checkpoint.manifest import DamagedCheckpoint, FileFacts

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_PIECES = "pieces"
_LONGEST_HEADER = 100_000_000
"""As in the safetensors library: a length out of thin air must not make the reader ask for all memory."""
_CHUNK_BYTES = 1 << 22


class Piece(NamedTuple):
    """Which rows of a tensor a file holds, beside those that it has."""

    full_shape: tuple[int, ...]
    row: int
    """The first one."""


class Entry(NamedTuple):
    """One tensor of a file, or some rows of one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    full_shape: tuple[int, ...]
    """Of the whole tensor, of which these are the rows from ``row`` on."""
    row: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        return self.shape == self.full_shape


def write_tensors(path: Path, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece] | None = None) -> FileFacts:
    """Writes a new file and flushes it to the disk; returns what the manifest says of it.

    Args:
        pieces: those of the tensors that are some rows of a larger one.

    Raises:
        OSError: no space, a quota, a disk that fails; what was written so far is left behind.
    """
    entries = file_layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, pieces or {})
    return write_entries(path, entries, (bytes_of(tensors[entry.name]) for entry in entries))


def file_layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Mapping[str, Piece]) -> list[Entry]:
    """Tensors of these types and shapes in the order in which they lie in a file, from offset 0 on."""
    entries, offset = [], 0
    # Wide types first: every tensor is aligned to its own type.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        full_shape, row = pieces.get(name, Piece(shape, 0))
        entries.append(Entry(name, dtype, shape, offset, full_shape, row))
        offset += entries[-1].nbytes
    return entries


def write_entries(path: Path, entries: Sequence[Entry], contents: Iterable[memoryview]) -> FileFacts:
    """Writes a new file of ``entries`` in their order; ``contents`` one after another are their bytes, however cut."""
    with hashing_writer(path) as write:
        write(_header(entries))
        for data in contents:
            for start in range(0, len(data), _CHUNK_BYTES):
                write(data[start : start + _CHUNK_BYTES])
    return write.facts()


def write_text(path: Path, text: str) -> FileFacts:
    """The same for a file of text."""
    with hashing_writer(path) as write:
        write(memoryview(text.encode()))
    return write.facts()


class _Writer:
    """Writes to a file and remembers what."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def __call__(self, data: memoryview) -> None:
        self._digest.update(data)
        self._size += len(data)
        while data:  # an unbuffered write may take a part only
            data = data[self._file.write(data) :]

    def facts(self) -> FileFacts:
        return FileFacts(self._size, self._digest.hexdigest())


@contextmanager
def hashing_writer(path: Path) -> Iterator[_Writer]:
    """A function that appends bytes to a new file; the file is on the disk when the block ends."""
    # Exclusive: two writers of one file would be a mistake that no later check could find.
    with io.FileIO(path, "xb") as file:
        yield _Writer(file)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # What is read back to be verified then comes from the disk, and the page cache stays for the data.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order in which they lie there, without their values.

    Raises:
        DamagedCheckpoint: the file is not one of this format, whatever it claims.
    """
    with _open(path) as file:
        return _read_entries(file, path, digest=hashlib.sha256())


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; memory is taken for those that are looked at. Writes stay private.

    Raises:
        DamagedCheckpoint: the file is not one of this format.
    """
    entries = read_entries(path)
    with _open(path) as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # A storage for each, not views of one: torch.save writes whole storages.
    return {entry.name: _mapped(memory, entry) for entry in entries}


class TensorReader:
    """Reads the tensors of one file in order and hashes every byte. Use it as a context."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._file = _open(path)
        try:
            self.entries = _read_entries(self._file, path, digest=self._digest)
        except BaseException:
            self._file.close()
            raise
        self._size = self.entries[0].offset if self.entries else os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        """Every tensor once, on the CPU.

        Raises:
            DamagedCheckpoint: the file ends early, or cannot be read.
        """
        for entry in self.entries:
            yield entry, view_of(self.read_block([entry]), entry, start=entry.offset)

    def read_block(self, entries: Sequence[Entry]) -> Tensor:
        """The bytes of the next entries, which lie one after another: uint8, on the CPU. Look with ``view_of``.

        Raises:
            DamagedCheckpoint: the file ends early, or cannot be read.
        """
        block = torch.empty(sum(entry.nbytes for entry in entries), dtype=torch.uint8)
        self._fill(bytes_of(block))
        self._size += len(block)
        return block

    def facts(self) -> FileFacts:
        """Of what was read: to be compared with the manifest when all of it was."""
        return FileFacts(self._size, self._digest.hexdigest())

    def _fill(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            _read_exactly(self._file, chunk, self._path)
            self._digest.update(chunk)


def view_of(block: Tensor, entry: Entry, *, start: int) -> Tensor:
    """A tensor within the bytes of a file from ``start`` on; it must lie at a multiple of its type's size there."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype, device=block.device)
    at = entry.offset - start
    return block[at : at + entry.nbytes].view(entry.dtype).view(entry.shape)


def _mapped(memory: mmap.mmap, entry: Entry) -> Tensor:
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)


def _header(entries: Sequence[Entry]) -> memoryview:
    header: dict[str, Any] = {}
    pieces = {entry.name: [entry.full_shape, entry.row] for entry in entries if not entry.is_whole}
    if pieces:
        header[_METADATA] = {_PIECES: json.dumps(pieces, separators=(",", ":"))}
    position = 0
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise ValueError(f"{entry.name!r} is of {entry.dtype}, which the format has no name for")
        end = position + entry.nbytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, or of a copy that is one."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path, "rb")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be opened ({error.strerror})") from None


def _read_entries(file: io.FileIO, path: Path, *, digest: Any) -> list[Entry]:
    size = os.fstat(file.fileno()).st_size
    length_field = bytearray(_LENGTH_BYTES)
    _read_exactly(file, memoryview(length_field), path)
    length = int.from_bytes(length_field, "little")
    if length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
        raise DamagedCheckpoint(f"{path} claims a header of {length} bytes in a file of {size}")
    text = bytearray(length)
    _read_exactly(file, memoryview(text), path)
    digest.update(length_field)
    digest.update(text)
    try:
        return _parse_entries(json.loads(text), data_offset=_LENGTH_BYTES + length, size=size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} has no valid header ({error!r})") from None


def _parse_entries(header: dict[str, Any], *, data_offset: int, size: int) -> list[Entry]:
    """Tensors must lie one after another without gaps and end with the file: nothing is hidden, nothing overlaps."""
    spans = sorted((*fields["data_offsets"], name) for name, fields in header.items() if name != _METADATA)
    pieces: dict[str, Any] = json.loads(header.get(_METADATA, {}).get(_PIECES, "{}"))
    if unknown := pieces.keys() - header.keys():
        raise ValueError(f"pieces of tensors that are not there, such as {min(unknown)!r}")
    entries, position = [], 0
    for start, end, name in spans:
        dtype, shape = _DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        if any(not isinstance(dim, int) or dim < 0 for dim in shape):
            raise ValueError(f"shape {shape} of {name!r}")
        entry = Entry(name, dtype, shape, data_offset + start, *_parse_piece(pieces.get(name), name, shape))
        if start != position or end - start != entry.nbytes:
            raise ValueError(f"{name!r} lies from {start} to {end}, expected from {position} to {start + entry.nbytes}")
        entries.append(entry)
        position = end
    if data_offset + position != size:
        raise ValueError(f"data end at byte {data_offset + position} of {size}")
    return entries


def _parse_piece(piece: Any, name: str, shape: tuple[int, ...]) -> Piece:
    """Rows that cannot be rows of the whole are refused; whether all of them are somewhere, no file knows."""
    if piece is None:
        return Piece(shape, 0)
    full_shape, row = tuple(piece[0]), piece[1]
    if not all(type(number) is int and number >= 0 for number in (*full_shape, row)):
        raise ValueError(f"{name!r} is a piece of {piece}")
    if not shape or full_shape[1:] != shape[1:] or not full_shape or row + shape[0] > full_shape[0]:
        raise ValueError(f"{name!r} has rows of shape {shape} from row {row} on, of a tensor of shape {full_shape}")
    return Piece(full_shape, row)


def _read_exactly(file: io.FileIO, target: memoryview, path: Path) -> None:
    while target:
        try:
            count = file.readinto(target)
        except OSError as error:
            raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
        if not count:
            raise DamagedCheckpoint(f"{path} ends {len(target)} bytes too early")
        target = target[count:]
