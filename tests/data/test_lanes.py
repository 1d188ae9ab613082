from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.lanes import (
    LanePosition,
    drawn_shard,
    lanes_of_worker,
    mix,
    permutation,
    read_lane,
    shard_of_slot,
)
from training.data.tar_reader import RawSample


class NumberSource:
    """Slots of known sizes; a sample's key says where it comes from."""

    slots_per_epoch = 3
    sizes = (5, 1, 8)

    def read_slot(self, slot: int, *, start: int) -> Iterator[RawSample]:
        for index in range(start, self.sizes[slot % 3]):
            yield RawSample(f"{slot}/{index}", {})


class EmptySource(NumberSource):
    sizes = (0, 0, 0)


@given(n=st.integers(1, 300), key=st.integers(0, 2**63))
def test_a_permutation_visits_everything_once(n: int, key: int) -> None:
    assert sorted(permutation(n, key).tolist()) == list(range(n))


def test_the_order_is_the_same_on_every_machine() -> None:
    """Pinned values: a change here changes the data order of every run that resumes."""
    assert permutation(8, 0, 0).tolist() == [1, 3, 6, 5, 0, 7, 4, 2]
    assert mix(1, 2, 3) == 15020427595393229491


@given(shards=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_epoch_mode_visits_every_shard_once_per_epoch(shards: int, seed: int, epoch: int) -> None:
    slots = range(epoch * shards, (epoch + 1) * shards)
    assert sorted(shard_of_slot(slot, num_shards=shards, seed=seed) for slot in slots) == list(range(shards))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(shard_of_slot(100 * epoch + i, num_shards=100, seed=seed) for i in range(100))
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


def test_resampled_mode_draws_shards_by_weight() -> None:
    cumulative = np.cumsum([1.0, 1.0, 2.0, 0.0])
    counts = Counter(drawn_shard(slot, cumulative_weights=cumulative, seed=3) for slot in range(20_000))
    assert counts[3] == 0
    assert counts[2] / 20_000 == pytest.approx(0.5, abs=0.02)
    assert counts[0] / 20_000 == pytest.approx(0.25, abs=0.02)


@given(world=st.integers(1, 6), workers=st.integers(1, 4), per_worker=st.integers(1, 4))
def test_every_lane_has_one_owner(world: int, workers: int, per_worker: int) -> None:
    num_lanes = world * workers * per_worker
    owned = [
        lane
        for rank in range(world)
        for worker in range(workers)
        for lane in lanes_of_worker(
            num_lanes=num_lanes, rank=rank, world_size=world, worker=worker, num_workers=workers
        )
    ]
    assert sorted(owned) == list(range(num_lanes))


@given(lanes=st.integers(1, 4), block=st.integers(1, 6), seed=st.integers(0, 5))
def test_a_lane_emits_every_sample_of_its_slots_once(lanes: int, block: int, seed: int) -> None:
    for lane in range(lanes):
        slots = range(lane, 6 * lanes, lanes)
        expected = sorted(f"{slot}/{index}" for slot in slots for index in range(NumberSource.sizes[slot % 3]))
        stream = read_lane(NumberSource(), lane, num_lanes=lanes, block=block, seed=seed, position=LanePosition())
        assert sorted(raw.key for raw, _, _ in islice(stream, len(expected))) == expected


@given(cut=st.integers(0, 40), block=st.integers(1, 6))
def test_a_lane_goes_on_exactly_where_its_position_was_taken(cut: int, block: int) -> None:
    def stream(position: LanePosition) -> Iterator[tuple[RawSample, object, LanePosition]]:
        return read_lane(NumberSource(), 1, num_lanes=2, block=block, seed=7, position=position)

    whole = list(islice(stream(LanePosition()), 60))
    position = whole[cut - 1][2] if cut else LanePosition()
    assert list(islice(stream(position), 60 - cut)) == whole[cut:]


def test_sources_without_any_sample_are_an_error_and_no_endless_loop() -> None:
    stream = read_lane(EmptySource(), 0, num_lanes=1, block=4, seed=0, position=LanePosition())
    with pytest.raises(ValueError, match="100 shards in a row hold no sample"):
        next(stream)
