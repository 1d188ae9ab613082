"""Reads image paths and captions from a CSV or TSV file, and serves them to lanes in a keyed random order."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from training.data.lanes import epoch_order
from training.data.sources import NO_COUNTERS, slot_rows
from training.data.tar_reader import RawSample

_NOT_THE_ROWS_FAULT = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)
_LONGEST_FIELD = 1 << 24


class StringTable:
    """Many strings in two arrays: worker processes share them without the copies that lists of strings cause."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def digest(self) -> str:
        """sha256 of the strings and where they end."""
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode()


class CsvTable:
    """Rows of (image path, caption). A relative path that does not exist as written is taken relative to the file."""

    def __init__(self, path: str, *, separator: str, image_column: str, caption_column: str, flag: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"CSV file {path!r} does not exist: correct {flag}.")
        csv.field_size_limit(_LONGEST_FIELD)  # 128 KiB otherwise; the decoder counts captions that are too long
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter=separator)
            columns = list(reader.fieldnames or [])
            for column, column_flag in ((image_column, "--csv-img-key"), (caption_column, "--csv-caption-key")):
                if column not in columns:
                    raise ValueError(
                        f"{path!r} has no column {column!r} (its columns: {', '.join(map(repr, columns))}): pass "
                        f"{column_flag}, and --csv-separator if the columns are not split by {separator!r}."
                    )
            rows = [(row[image_column] or "", row[caption_column] or "") for row in reader]
        if not rows:
            raise ValueError(f"CSV file {path!r} has no rows: correct {flag}.")
        self.path = path
        self.directory = os.path.dirname(path)
        self.images = StringTable([image for image, _ in rows])
        self.captions = StringTable([caption for _, caption in rows])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """sha256 of all rows in order: two runs with the same digest read the same stream."""
        return hashlib.sha256((self.images.digest + self.captions.digest).encode()).hexdigest()

    def read_row(self, row: int) -> RawSample:
        """The row's file and caption; a missing file gives a sample without an image, which the decoder counts."""
        path = self.images[row]
        if not os.path.isabs(path) and not os.path.exists(path):
            path = os.path.join(self.directory, path)
        members = {"txt": self.captions[row].encode()}
        try:
            with open(path, "rb") as file:
                members["jpg"] = file.read()
        except (OSError, ValueError) as error:  # a name that cannot be one is a ValueError
            if isinstance(error, OSError) and error.errno in _NOT_THE_ROWS_FAULT:
                raise
        return RawSample(self.images[row], members)


class CsvSource:
    """Rows of a table in slots: each epoch permutes all rows and cuts the permutation into slots."""

    parts = 1
    counters = NO_COUNTERS

    def __init__(self, table: CsvTable, *, seed: int) -> None:
        self.table = table
        self.seed = seed
        self.slot_rows = slot_rows(len(table))
        self.slots_per_epoch = -(-len(table) // self.slot_rows)
        self.source_names = (table.path,)

    def shard_name(self, slot: int) -> str:
        """The file: its rows are the samples' keys."""
        return self.table.path

    def source_of(self, slot: int) -> int:
        """There is only one source."""
        return 0

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        """The rows of one slot of the epoch's permutation."""
        epoch, place = divmod(slot, self.slots_per_epoch)
        order = epoch_order(len(self.table), seed=self.seed, epoch=epoch)
        first = place * self.slot_rows
        for row in order[first + start : first + self.slot_rows]:
            yield self.table.read_row(int(row))
