from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.lanes import (
    Deal,
    LanePosition,
    Piece,
    drawn_shard,
    epoch_order,
    first_turn,
    mix,
    owned_lanes,
    permutation,
    shard_of_slot,
)


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
    orders = {tuple(epoch_order(100, seed=seed, epoch=epoch).tolist()) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_resampled_mode_draws_in_proportion_to_the_weights() -> None:
    cumulative = np.cumsum([1.0, 0.0, 3.0])
    draws = Counter(drawn_shard(slot, cumulative_weights=cumulative, seed=5) for slot in range(20_000))
    assert draws[1] == 0
    assert draws[2] / draws[0] == pytest.approx(3.0, rel=0.05)


@given(lanes=st.integers(1, 100), world=st.integers(1, 16))
def test_every_lane_has_one_owner(lanes: int, world: int) -> None:
    owned = [lane for rank in range(world) for lane in owned_lanes(lanes, rank=rank, world_size=world)]
    assert sorted(owned) == list(range(lanes))


@given(per_rank=st.integers(1, 8), world=st.integers(1, 6), emitted=st.integers(0, 500))
def test_the_global_round_robin_goes_on_in_another_world(per_rank: int, world: int, emitted: int) -> None:
    """The next sample of all ranks together is the next of the one global cycle over lanes."""
    lanes = per_rank * world
    following = {(emitted + i) % lanes for i in range(world)}
    firsts = {
        owned_lanes(lanes, rank=rank, world_size=world)[
            first_turn(lanes, emitted=emitted, rank=rank, world_size=world)
        ]
        for rank in range(world)
    }
    assert firsts == following


@given(lanes=st.integers(1, 9), block=st.integers(1, 9), slot=st.integers(0, 50))
def test_only_the_first_block_of_a_slot_is_cut_short(lanes: int, block: int, slot: int) -> None:
    deal = Deal(lanes, block, seed=3)
    lane, turn = slot % lanes, slot // lanes
    assert 1 <= deal.block_length(lane, turn, 0) <= block
    assert deal.block_length(lane, turn, 5) == block


def test_lanes_do_not_need_their_second_blocks_all_at_once() -> None:
    deal = Deal(64, 100, seed=0)
    assert len({deal.block_length(lane, 0, 0) for lane in range(64)}) > 30


def test_a_new_deal_begins_with_the_rests_and_then_what_nobody_touched() -> None:
    deal = Deal(3, 10, seed=0)
    # Lane 0 is within slot 3, lane 1 within slot 1 (so slot 4 is untouched), lane 2 has just come to slot 5.
    positions = [LanePosition(1, 20, 4, 999), LanePosition(0, 0, 0), LanePosition(1, 0, 0)]
    again = deal.again(positions, num_lanes=2, block=7)
    items = [again.piece(item % 2, item // 2) for item in range(6)]
    assert items == [Piece(1), Piece(3, 20, 4, 999, 10), Piece(4), Piece(5), Piece(6), Piece(7)]
    assert again.start(1, 0) == LanePosition(0, 20, 4, 999)
    assert again.block_length(1, 0, 20) == 10, "the block that was begun keeps its length"
    assert again.block_length(1, 0, 30) == 7


def test_dealing_twice_without_reading_changes_nothing() -> None:
    deal = Deal(3, 10, seed=0)
    positions = [LanePosition(1, 20, 4, 999), LanePosition(0, 7, 0, 50), LanePosition(2, 0, 0)]
    once = deal.again(positions, num_lanes=4, block=10)
    twice = once.again([once.start(lane, 0) for lane in range(4)], num_lanes=4, block=10)
    assert once.first_slot == twice.first_slot
    assert once.pieces.tolist() == twice.pieces.tolist()
