"""Reads samples of shards as training would, and counts what is in them and what is wrong with them."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from PIL import Image

from training.data.captions import CaptionReader, first_member
from training.data.image_file import UnusableSample, decode_image
from training.data.storage import StorageError, open_shard
from training.data.tar_reader import RawSample, TarError, read_samples

_SPREAD_SHARDS = 16
_THUMBNAIL_SIDE = 256

CountTokens = Callable[[str], int]


class Broken(NamedTuple):
    """A sample that training would skip, or a shard that ends early (``key`` is None): where it is, and why."""

    reason: str
    url: str
    key: str | None
    offset: int


class Cell(NamedTuple):
    """A sample for the contact sheet, small."""

    image: Image.Image
    caption: str


@dataclass
class Findings:
    """What was read."""

    shards: int = 0
    shards_to_the_end: int = 0
    samples: int = 0
    bytes: int = 0
    extensions: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    caption_chars: list[int] = field(default_factory=list)
    caption_tokens: list[int] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)


class Inspector:
    """Reads samples and keeps count; a random few of the good ones are kept for the contact sheet."""

    def __init__(
        self,
        *,
        read_caption: CaptionReader,
        image_extensions: Sequence[str],
        max_image_pixels: int,
        count_tokens: CountTokens,
        num_cells: int,
        seed: int = 0,
    ) -> None:
        self.findings = Findings()
        self._read_caption = read_caption
        self._image_extensions = tuple(image_extensions)
        self._max_image_pixels = max_image_pixels
        self._count_tokens = count_tokens
        self._num_cells = num_cells
        self._random = random.Random(seed)

    def read_shard(self, url: str, limit: int | None) -> int:
        """Reads up to ``limit`` samples of a shard (None: all, and its end), and returns how many there were."""
        self.findings.shards += 1
        count = 0
        try:
            with open_shard(url) as stream:
                for raw in islice(read_samples(stream), limit):
                    count += 1
                    self._add(raw, url)
                if limit is None or count < limit:
                    self.findings.shards_to_the_end += 1
        except TarError as error:
            self.findings.broken.append(Broken(f"damaged shard: {error}", url, None, error.offset))
        except StorageError as error:
            self.findings.broken.append(Broken(f"unreadable shard: {error}", url, None, 0))
        return count

    def _add(self, raw: RawSample, url: str) -> None:
        findings = self.findings
        findings.samples += 1
        findings.bytes += sum(map(len, raw.members.values()))
        findings.extensions.update(list(raw.members))
        good = 0
        caption = ""
        try:
            caption = self._read_caption(raw, seed=0)
            findings.caption_chars.append(len(caption))
            findings.caption_tokens.append(self._count_tokens(caption))
            good += 1
        except UnusableSample as fault:
            findings.broken.append(Broken(fault.reason, url, raw.key, raw.offset))
        try:
            image = self._image(raw)
            good += 1
        except UnusableSample as fault:
            findings.broken.append(Broken(fault.reason, url, raw.key, raw.offset))
            return
        if good == 2:
            self._keep(image, caption)

    def _image(self, raw: RawSample) -> Image.Image:
        data = first_member(raw, self._image_extensions, missing="no_image")
        image = decode_image(data, max_pixels=self._max_image_pixels)
        with Image.open(io.BytesIO(data)) as header:
            self.findings.formats[header.format or "unknown"] += 1
        self.findings.widths.append(image.width)
        self.findings.heights.append(image.height)
        self.findings.image_bytes.append(len(data))
        return image

    def _keep(self, image: Image.Image, caption: str) -> None:
        """Reservoir sampling: at any time the cells are a random choice of the good samples so far."""
        cells = self.findings.cells
        place = len(cells) if len(cells) < self._num_cells else self._random.randrange(len(self.findings.image_bytes))
        if place >= self._num_cells:
            return
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        if place == len(cells):
            cells.append(Cell(image, caption))
        else:
            cells[place] = Cell(image, caption)


def spread(urls: Sequence[str], num_samples: int) -> Iterator[tuple[str, int]]:
    """(shard, how many of its samples) for a bounded look: at most 16 shards, evenly spaced over the list."""
    count = max(1, min(len(urls), _SPREAD_SHARDS, num_samples))
    for index in range(count):
        quota = num_samples * (index + 1) // count - num_samples * index // count
        yield urls[index * len(urls) // count], quota
