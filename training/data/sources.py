"""What lanes read: webdataset tars, or synthetic samples that need no data at all. (CSV files: ``csv_reader.py``.)"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image

from training.data.lanes import drawn_shard, mix, shard_of_slot
from training.data.shards import ShardList
from training.data.storage import StorageError, open_shard
from training.data.tar_reader import RawSample, TarError, read_samples

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_BACKOFF_S = 1.0


class TarSource:
    """Webdataset shards. A shard that breaks off is read up to the break, with a warning that names shard and byte."""

    def __init__(self, shards: ShardList, *, resampled: bool, seed: int) -> None:
        self.shards = shards
        self.resampled = resampled
        self.seed = seed
        self.slots_per_epoch = len(shards.urls)
        self._cumulative_weights = np.cumsum(np.asarray(shards.weights, dtype=np.float64))

    def shard_url(self, slot: int) -> str:
        """The shard that a slot reads."""
        if self.resampled:
            return self.shards.urls[drawn_shard(slot, cumulative_weights=self._cumulative_weights, seed=self.seed)]
        return self.shards.urls[shard_of_slot(slot, num_shards=len(self.shards.urls), seed=self.seed)]

    def read_slot(self, slot: int, *, start: int) -> Iterator[RawSample]:
        """The samples of the slot's shard from raw index ``start`` on; a broken connection continues where it broke.

        Raises:
            StorageError: the shard could not be read in several attempts.
        """
        url = self.shard_url(slot)
        index = start
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with open_shard(url) as stream:
                    for sample in islice(read_samples(stream), index, None):
                        index += 1
                        yield sample
                return
            except TarError as error:
                logger.warning("Shard %s is damaged (%s): %d samples read, the rest is lost.", url, error, index)
                return
            except StorageError as error:
                if attempt == _ATTEMPTS:
                    raise
                logger.warning("%s Attempt %d of %d.", error, attempt, _ATTEMPTS)
                time.sleep(_BACKOFF_S * 2 ** (attempt - 1))


class SyntheticSource:
    """Random noise with numbered captions: every part of the engine runs, nothing is learnt, no data is needed."""

    _SLOT_SAMPLES = 512

    def __init__(self, *, image_size: tuple[int, int], num_samples: int, seed: int) -> None:
        self.seed = seed
        self.slots_per_epoch = -(-num_samples // self._SLOT_SAMPLES)
        self.image_size = image_size

    def read_slot(self, slot: int, *, start: int) -> Iterator[RawSample]:
        """512 noise images per slot, each with a caption of its own."""
        for index in range(start, self._SLOT_SAMPLES):
            noise = np.random.default_rng(mix(self.seed, slot, index)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            height, width = self.image_size
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(buffer, "JPEG")
            caption = f"synthetic image {slot * self._SLOT_SAMPLES + index}"
            yield RawSample(f"{slot}/{index}", {"jpg": buffer.getvalue(), "txt": caption.encode()})
