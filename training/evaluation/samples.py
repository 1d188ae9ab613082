"""The samples of evaluation sets: who evaluates which, from an index of images or from a stream of shards.

A source deals its samples to ``parts``, one per loader process of each rank. Each sample belongs to exactly one part.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

from training.data.captions import CAPTION_LIST
from training.data.csv_reader import CsvTable, StringTable
from training.data.decode import UnusableSample, decode_caption, first_member
from training.data.storage import open_shard
from training.data.tar_reader import RawSample, read_samples
from training.evaluation.tar_index import TarRecord

logger = logging.getLogger(__name__)

_SHARD_BITS = 32


class EvaluationSample(NamedTuple):
    """An undecoded sample. ``label`` is -1 and ``captions`` empty where there is none."""

    position: int
    """Its place in the whole set, the same on any number of ranks."""
    origin: str
    """What an error calls it: shard and key, or the file's path."""
    image: bytes
    label: int = -1
    captions: tuple[str, ...] = ()


class SampleSource(Protocol):
    """A data set to evaluate on."""

    flag: str
    """The flag that named it, for errors."""

    @property
    def num_samples(self) -> int | None:
        """None where only reading everything would tell."""

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        """The samples of one part, in increasing position."""


class IndexedTars:
    """Samples of local tars, read by offset: part p has the samples whose position % num_parts is p."""

    def __init__(self, records: Sequence[TarRecord], *, flag: str) -> None:
        self.flag = flag
        self.paths = sorted({record.path for record in records})
        numbers = {path: number for number, path in enumerate(self.paths)}
        # Arrays, not lists of objects: loader processes share them without copies.
        self._shards = np.array([numbers[record.path] for record in records], dtype=np.int32)
        self._offsets = np.array([record.offset for record in records], dtype=np.int64)
        self._sizes = np.array([record.size for record in records], dtype=np.int64)
        self._labels = np.array([record.label for record in records], dtype=np.int64)
        self._keys = StringTable([record.key for record in records])
        self._captions = StringTable([caption for record in records for caption in record.captions])
        self._caption_ends = np.cumsum([len(record.captions) for record in records], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return len(self._offsets)

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        mine = range(part, self.num_samples, num_parts)
        for shard, group in groupby(mine, key=self._shards.__getitem__):
            path = self.paths[shard]
            with open(path, "rb") as stream:
                for index in group:
                    stream.seek(int(self._offsets[index]))
                    image = stream.read(int(self._sizes[index]))
                    origin = f"shard {path!r}, sample {self._keys[index]!r}"
                    label, captions = int(self._labels[index]), self._captions_of(index)
                    yield EvaluationSample(index, origin, image, label, captions)

    def _captions_of(self, index: int) -> tuple[str, ...]:
        start = int(self._caption_ends[index - 1]) if index else 0
        return tuple(self._captions[place] for place in range(start, int(self._caption_ends[index])))


class LabelledFolders:
    """Image files with the number of their class; parts as in ``IndexedTars``."""

    def __init__(self, files: Sequence[tuple[str, int]], *, flag: str) -> None:
        self.flag = flag
        self._paths = StringTable([path for path, _ in files])
        self._labels = np.array([label for _, label in files], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return len(self._labels)

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        for index in range(part, self.num_samples, num_parts):
            path = self._paths[index]
            with open(path, "rb") as file:
                yield EvaluationSample(index, f"file {path!r}", file.read(), int(self._labels[index]))


class CsvPairs:
    """Image files and captions of a CSV, rows without a caption left out; parts as in ``IndexedTars``."""

    def __init__(self, table: CsvTable, *, flag: str) -> None:
        self.flag = flag
        self.table = table
        self._rows = [row for row in range(len(table)) if table.captions[row].strip()]

    @property
    def num_samples(self) -> int:
        return len(self._rows)

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        for index in range(part, self.num_samples, num_parts):
            row = self.table.read_row(self._rows[index])
            if "jpg" not in row.members:
                raise ValueError(f"File {row.key!r} of {self.flag} does not exist.")
            listed = row.members.get(CAPTION_LIST)
            caption = row.members["txt"].decode() if listed is None else str(json.loads(listed)[0])
            yield EvaluationSample(index, f"file {row.key!r}", row.members["jpg"], captions=(caption,))


class StreamedTars:
    """Samples of shards that can only be read in order (``pipe:``, remote): part p has the shards p, p + num_parts, ...

    Whole shards are dealt, so every byte is read once; with fewer shards than ranks some ranks have nothing to do.
    """

    num_samples = None

    def __init__(
        self, urls: Sequence[str], *, image_extensions: Sequence[str], text_extensions: Sequence[str], flag: str
    ) -> None:
        self.urls = tuple(urls)
        self.image_extensions = tuple(image_extensions)
        self.text_extensions = tuple(text_extensions)
        self.flag = flag

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        for shard in range(part, len(self.urls), num_parts):
            url = self.urls[shard]
            found = unfit = 0
            with open_shard(url) as stream:
                for raw in read_samples(stream):
                    position = (shard << _SHARD_BITS) | found
                    sample = self._pair(raw, position=position, origin=f"shard {url!r}, sample {raw.key!r}")
                    if sample is None:
                        unfit += 1
                        continue
                    yield sample
                    found += 1
            if unfit:
                logger.warning("%s: %d samples of %s are no pairs and are left out.", self.flag, unfit, url)

    def _pair(self, raw: RawSample, *, position: int, origin: str) -> EvaluationSample | None:
        try:
            image = first_member(raw, self.image_extensions, missing="no_image")
            text = first_member(raw, self.text_extensions, missing="no_caption")
            return EvaluationSample(position, origin, image, captions=(decode_caption(text),))
        except UnusableSample:
            return None


def folder_files(directory: str, extensions: tuple[str, ...]) -> list[str]:
    """Image files below a directory, in the order of torchvision's ImageFolder."""
    files: list[str] = []
    for root, _, names in sorted(os.walk(directory, followlinks=True)):
        files += [os.path.join(root, name) for name in sorted(names) if name.lower().endswith(extensions)]
    return files
