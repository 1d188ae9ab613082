"""Slots of shards: whole ones, parts of them, and where reading goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.stream_simulation import Job, NumberSource
from tests.factories import write_shards
from training.data.shards import expand_shards
from training.data.sources import SyntheticSource, TarSource
from training.data.storage import Storage


def source(tmp_path: Path, *, parts: int = 1, resampled: bool = False, factors: str | None = None) -> TarSource:
    pattern = write_shards(tmp_path / "a", shards=2, samples=11)
    if factors is not None:
        pattern += "::" + write_shards(tmp_path / "b", shards=1, samples=11)
    shards = expand_shards(pattern, upsampling_factors=factors)
    return TarSource(shards, resampled=resampled, seed=3, storage=Storage(), parts=parts)


def keys(tars: TarSource, slot: int, *, start: int = 0, offset: int = 0) -> list[str]:
    return [raw.key for raw in tars.read_slot(slot, start=start, offset=offset)]


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_slots_of_an_epoch_hold_every_sample_once(tmp_path: Path, parts: int) -> None:
    tars = source(tmp_path, parts=parts)
    seen = Counter(key for slot in range(tars.slots_per_epoch) for key in keys(tars, slot))
    assert tars.slots_per_epoch == 2 * parts
    assert len(seen) == 22
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("parts", [1, 3])
def test_reading_goes_on_at_any_sample_with_and_without_its_byte(tmp_path: Path, parts: int) -> None:
    tars = source(tmp_path, parts=parts)
    whole = list(tars.read_slot(1, start=0, offset=0))
    names = [raw.key for raw in whole]
    for start, raw in enumerate(whole):
        assert keys(tars, 1, start=start) == names[start:]
        assert keys(tars, 1, start=start, offset=raw.offset) == names[start:]


def test_a_byte_spares_reading_what_comes_before_it(tmp_path: Path) -> None:
    tars = source(tmp_path)
    last = list(tars.read_slot(0, start=0, offset=0))[-1]
    before = tars.storage.counters["bytes_read"]
    assert keys(tars, 0, start=10, offset=last.offset) == [last.key]
    assert tars.storage.counters["bytes_read"] - before < 15_000  # one sample and the end of the archive


def test_a_part_holds_every_fourth_sample_of_its_shard(tmp_path: Path) -> None:
    tars = source(tmp_path, parts=4)
    for slot in range(8):
        _, part = tars.shard_and_part(slot)
        assert [int(key.rpartition("-")[2]) for key in keys(tars, slot)] == list(range(part, 11, 4))


def test_slots_know_their_shard_and_source(tmp_path: Path) -> None:
    tars = source(tmp_path, resampled=True, factors="1::4")
    drawn = Counter(tars.source_of(slot) for slot in range(600))
    assert drawn[1] / drawn[0] == pytest.approx(2.0, rel=0.2)  # one shard of weight 4 against two of weight 1
    assert all(("/b/" in tars.shard_name(slot)) == (tars.source_of(slot) == 1) for slot in range(50))


def test_synthetic_samples_differ_and_are_the_same_every_time() -> None:
    synthetic = SyntheticSource(image_size=(16, 16), num_samples=960, seed=0)
    first, again = (list(synthetic.read_slot(5, start=0, offset=0)) for _ in range(2))
    assert first == again
    assert len({raw.members["jpg"] for raw in first}) == len(first) == 10
    assert list(synthetic.read_slot(5, start=7, offset=0)) == first[7:]


class CountingSource(NumberSource):
    """Counts the samples that are read."""

    read = 0

    def read_slot(self, slot: int, *, start: int, offset: int):
        for raw in super().read_slot(slot, start=start, offset=offset):
            self.read += 1
            yield raw


def test_a_resume_reads_at_most_one_block_of_each_lane_again() -> None:
    numbers = CountingSource([200] * 6)
    job = Job(numbers, 6, 10)
    job.run(1, 6, 100)
    (loader,) = job.loaders(1, 6)
    numbers.read = 0
    next(iter(loader))
    assert 0 < numbers.read <= 6 * 10
