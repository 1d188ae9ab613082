"""What the data stream promises, over worlds, batches, cut points and lane counts that hypothesis makes up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.stream_simulation import Job, NumberDecoder, NumberSource, counted, ids
from training.data.lanes import Deal, LanePosition
from training.data.position import StreamIdentity, StreamPosition, read_position

sizes = st.lists(st.integers(1, 12), min_size=6, max_size=14)
legs = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=4)
"""(ranks, samples per rank, steps) of consecutive runs."""


def finish_epoch(job: Job) -> list[list[tuple[int, int]]]:
    """Runs on one rank until every lane has left the first epoch."""
    steps: list[list[tuple[int, int]]] = []
    for _ in range(400):
        steps += job.run(1, 4, 5)
        assert job.position is not None
        deal = job.position.deal
        slots = [deal.piece(lane, position.turn).slot for lane, position in enumerate(job.position.lanes)]
        if min(slots) >= job.source.slots_per_epoch:
            return steps
    raise AssertionError("the epoch does not end")


@settings(deadline=None)
@given(sizes=sizes, lanes=st.integers(5, 6), block=st.integers(1, 9), legs=legs)
def test_every_sample_of_an_epoch_comes_exactly_once_on_any_chain_of_worlds(sizes, lanes, block, legs):
    job = Job(NumberSource(sizes), lanes, block)
    seen = counted([step for world, batch, steps in legs for step in job.run(world, batch, steps)])
    seen += counted(finish_epoch(job))
    epoch = job.source.epoch()
    assert {sample: seen[sample] for sample in epoch} == dict.fromkeys(epoch, 1)
    assert max(seen.values()) == 1


@settings(deadline=None)
@given(sizes=sizes, lanes=st.integers(5, 6), block=st.integers(1, 9), legs=legs)
def test_every_lane_is_an_exact_prefix_of_its_uninterrupted_self(sizes, lanes, block, legs):
    job = Job(NumberSource(sizes), lanes, block)
    seen = [sample for world, batch, steps in legs for step in job.run(world, batch, steps) for sample in step]
    for lane in range(lanes):
        emitted = [sample for sample in seen if sample[0] % lanes == lane]  # without pieces, slot mod L is the lane
        assert emitted == job.lane_stream(lane, len(emitted))


@settings(deadline=None)
@given(
    sizes=sizes,
    block=st.integers(1, 9),
    legs=st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_global_batches_are_the_same_on_all_worlds_that_divide_lanes_and_batch(sizes, block, legs):
    elastic = Job(NumberSource(sizes), 6, block)
    steps = [set(step) for world, count in legs for step in elastic.run(world, 12 // world, count)]
    alone = Job(NumberSource(sizes), 6, block).run(1, 12, len(steps))
    assert steps == [set(step) for step in alone]


@settings(deadline=None)
@given(
    sizes=sizes,
    deals=st.lists(
        st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(1, 7), st.integers(0, 4)), min_size=1, max_size=4
    ),
)
def test_dealing_to_other_lanes_and_blocks_loses_and_repeats_nothing(sizes, deals):
    job = Job(NumberSource(sizes), 4, 5)
    seen = counted(job.run(2, 3, 3))
    for world, lanes, block, steps in deals:
        seen += counted(job.run(world, 3, steps, lanes=lanes, block=block))
    seen += counted(finish_epoch(job))
    epoch = job.source.epoch()
    assert {sample: seen[sample] for sample in epoch} == dict.fromkeys(epoch, 1)
    assert max(seen.values()) == 1


@settings(deadline=None)
@given(sizes=sizes, bad_every=st.integers(2, 5), legs=legs)
def test_unusable_samples_are_left_out_once_wherever_the_run_is_cut(sizes, bad_every, legs):
    job = Job(NumberSource(sizes), 5, 4, NumberDecoder(bad_every))
    seen = counted([step for world, batch, steps in legs for step in job.run(world, batch, steps)])
    seen += counted(finish_epoch(job))
    good = {(slot, index) for slot, index in job.source.epoch() if (7 * slot + index) % bad_every}
    assert {sample for sample in seen if sample[0] < job.source.slots_per_epoch} == good
    assert max(seen.values()) == 1


def test_shards_of_one_size_make_an_epoch_of_exactly_their_samples():
    job = Job(NumberSource([10] * 12), 6, 4)
    seen = counted(job.run(2, 5, 12))
    assert set(seen) == job.source.epoch()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_batches_are_the_same_with_any_number_of_workers(workers):
    def first_batches(number: int) -> list[list[tuple[int, int]]]:
        job = Job(NumberSource([9, 14, 3, 11, 8, 6, 12]), 7, 5, NumberDecoder(4), workers=number)
        return job.run(1, 10, 4)

    assert first_batches(workers) == first_batches(0)


def test_a_resume_with_other_workers_goes_on_with_the_same_samples():
    source = NumberSource([9, 14, 3, 11, 8, 6, 12])
    whole = Job(source, 7, 5).run(2, 5, 8)
    job = Job(source, 7, 5, workers=2)
    steps = job.run(2, 5, 3)
    job.workers = 3
    assert steps + job.run(2, 5, 5) == whole


def test_texts_and_identities_stand_in_the_same_rows():
    (loader,) = Job(NumberSource([9, 14, 3, 11]), 4, 5, workers=2).loaders(1, 6)
    batch = next(iter(loader))
    assert [tuple(row) for row in batch.texts.tolist()] == ids(batch.record)
    assert Counter(batch.record.counts)["read"] == 6


def test_a_position_of_another_stream_is_refused_with_the_differences():
    job = Job(NumberSource([4, 4]), 2, 2)
    job.run(1, 2, 1)
    assert job.position is not None
    saved = job.position.facts() | {"seed": 12, "sources": "letters"}
    (loader,) = Job(NumberSource([4, 4]), 2, 2).loaders(1, 2)

    with pytest.raises(ValueError, match=r"seed: saved 12, now 11; sources: saved 'letters'.*--train-data"):
        loader.load_position(read_position(job.position.tensors(), saved))


def test_synthetic_data_of_an_earlier_version_is_the_same_stream() -> None:
    """It named the image size as well."""
    identity = StreamIdentity(7, False, "synthetic (224, 224) 1000")
    position = StreamPosition(identity, Deal(1, 1, 7), [LanePosition()], 0, [0])
    assert read_position(position.tensors(), position.facts()).identity == identity._replace(sources="synthetic 1000")
