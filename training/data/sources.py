"""What lanes read: webdataset tars, or synthetic samples that need no data at all. (Tables: ``csv_reader.py``.)"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from PIL import Image

from training.data.lanes import drawn_shard, mix, shard_of_slot, slot_draw
from training.data.shards import ShardList
from training.data.storage import Storage
from training.data.tar_reader import RawSample, read_samples

_MAX_SLOT_ROWS = 512
_SLOTS_OF_A_SMALL_TABLE = 96
NO_COUNTERS: Mapping[str, int] = MappingProxyType({})
"""Of sources without a storage."""


def slot_rows(rows: int) -> int:
    """Rows in a slot of a table that is read in any order: few enough to deal a small table to many lanes."""
    return max(1, min(_MAX_SLOT_ROWS, rows // _SLOTS_OF_A_SMALL_TABLE))


class ShardDraw(Protocol):
    """Weights that follow a schedule."""

    def draw(self, u: float, progress: float) -> int:
        """The shard for a uniform number, after ``progress`` epochs."""


class TarSource:
    """Webdataset shards, or parts of them where there are fewer shards than lanes.

    Part p of P of a shard holds its samples p, p+P, p+2P, ...: it needs no index, and skips what is not its own.
    """

    def __init__(
        self,
        shards: ShardList,
        *,
        resampled: bool,
        seed: int,
        storage: Storage,
        parts: int = 1,
        schedule: ShardDraw | None = None,
        slots_per_epoch: int | None = None,
    ) -> None:
        """
        Args:
            parts: of each shard; 1 when resampled.
            schedule: draws the shards instead of their fixed weights.
            slots_per_epoch: when resampled; None: as many as there are shards.
        """
        self.shards = shards
        self.resampled = resampled
        self.seed = seed
        self.storage = storage
        self.parts = parts
        self.schedule = schedule
        self.slots_per_epoch = slots_per_epoch or len(shards.urls) * parts
        self.source_names = tuple(source.name for source in shards.sources)
        self._source_of_shard = shards.source_of_shard
        self._cumulative_weights = np.cumsum(np.asarray(shards.weights, dtype=np.float64))

    @property
    def counters(self) -> Mapping[str, int]:
        """What the storage has done for this source, in this process."""
        return self.storage.counters

    def shard_name(self, slot: int) -> str:
        """The URL of the shard that a slot reads."""
        return self.shards.urls[self.shard_and_part(slot)[0]]

    def source_of(self, slot: int) -> int:
        """Which of the ``::``-joined sources the slot's shard belongs to."""
        return int(self._source_of_shard[self.shard_and_part(slot)[0]])

    def shard_and_part(self, slot: int) -> tuple[int, int]:
        """(index into the shard list, part) of a slot."""
        if self.schedule is not None:
            return self.schedule.draw(slot_draw(slot, seed=self.seed), slot / self.slots_per_epoch), 0
        if self.resampled:
            return drawn_shard(slot, cumulative_weights=self._cumulative_weights, seed=self.seed), 0
        unit = shard_of_slot(slot, num_shards=self.slots_per_epoch, seed=self.seed)
        return divmod(unit, self.parts)

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        """The samples of the slot from raw index ``start`` on; ``offset`` is its byte, or 0 if that is unknown.

        Raises:
            StorageError: the shard could not be read. TarError: it is damaged.
        """
        shard, part = self.shard_and_part(slot)
        wanted_from = start * self.parts + part
        with self.storage.open(self.shards.urls[shard], offset=offset) as stream:
            yield from read_samples(
                stream,
                offset=offset,
                first_index=wanted_from if offset else 0,
                keep=lambda index: index >= wanted_from and index % self.parts == part,
            )


class SyntheticSource:
    """Random noise with numbered captions: every part of the engine runs, nothing is learnt, no data is needed."""

    source_names = ("synthetic",)
    parts = 1
    counters = NO_COUNTERS

    def __init__(self, *, image_size: tuple[int, int], num_samples: int, seed: int) -> None:
        self.seed = seed
        self.slot_samples = slot_rows(num_samples)
        self.slots_per_epoch = -(-num_samples // self.slot_samples)
        self.image_size = image_size

    def shard_name(self, slot: int) -> str:
        """A name for messages."""
        return f"synthetic slot {slot}"

    def source_of(self, slot: int) -> int:
        """There is only one source."""
        return 0

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        """A few hundred noise images per slot, each with a caption of its own."""
        for index in range(start, self.slot_samples):
            noise = np.random.default_rng(mix(self.seed, slot, index)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            height, width = self.image_size
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(buffer, "JPEG")
            caption = f"synthetic image {slot * self.slot_samples + index}"
            yield RawSample(f"{slot}/{index}", {"jpg": buffer.getvalue(), "txt": caption.encode()})
