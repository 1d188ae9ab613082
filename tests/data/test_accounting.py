"""What is counted, how it is added up over ranks, and when bad data end a run."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tests.data.stream_simulation import Job, NumberDecoder, NumberSource
from training.data.accounting import (
    COUNTERS,
    BadSampleBudget,
    DataBudgetExceeded,
    bad_fraction,
    data_metrics,
    from_vector,
    to_vector,
)
from training.data.meter import DataMeter
from training.data.position import add_counters
from training.data.tar_reader import TarError


class BreakingSource(NumberSource):
    """Every slot breaks off in its middle."""

    def read_slot(self, slot: int, *, start: int, offset: int):
        for index, raw in enumerate(super().read_slot(slot, start=start, offset=offset), start=start):
            if index == 20:
                raise TarError("truncated at byte 9", 9)
            yield raw


def test_counters_survive_the_way_through_a_vector():
    counts = Counter({name: index + 1 for index, name in enumerate(COUNTERS)})
    counts += Counter({"source/0": 7, "source/2": 5})
    assert from_vector(to_vector(counts, num_sources=3)) == counts


def test_an_unknown_reason_is_counted_as_other():
    counts = from_vector(to_vector({"skipped/cosmic_ray": 3, "skipped/other": 1}, num_sources=0))
    assert counts == {"skipped/other": 4}


def test_the_bad_fraction_counts_what_lost_shards_should_have_held():
    assert bad_fraction({"read": 90, "skipped/no_image": 5, "lost_samples": 10}) == 0.15
    assert bad_fraction({}) == 0.0


def test_a_spent_budget_ends_the_run_with_reasons_worst_shards_and_the_data_code():
    counts = {"read": 2000, "skipped/broken_image": 300, "lost/shard_damaged": 2}
    message = r"300 of 2000 .*--max-bad-samples 0\.1.*'broken_image': 300"
    with pytest.raises(DataBudgetExceeded, match=message) as stopped:
        BadSampleBudget(0.1).check(counts, worst_shards=lambda: Counter({"a.tar": 9, "b.tar": 291}))
    assert "Worst shards: b.tar (291), a.tar (9)" in str(stopped.value)
    assert stopped.value.code == 94


@pytest.mark.parametrize("limit", [0.15, 1.0])
def test_a_budget_that_is_not_spent_asks_nobody(limit):
    counts = {"read": 2000, "skipped/broken_image": 300}
    BadSampleBudget(limit).check(counts, worst_shards=lambda: pytest.fail("asked"))


def test_one_bad_shard_at_the_beginning_spends_no_budget():
    one = {"read": 10_000, "skipped/broken_image": 10_000, "slots_ended": 1, "slot_samples": 10_000}
    BadSampleBudget(0.1).check(one, worst_shards=lambda: pytest.fail("asked"))
    three = {name: 3 * count for name, count in one.items()}
    with pytest.raises(DataBudgetExceeded, match="30000 of 30000"):
        BadSampleBudget(0.1).check(three, worst_shards=Counter)


def test_what_a_lost_shard_held_is_judged_by_the_shards_that_were_read_not_by_the_epoch():
    source = BreakingSource([40] * 12)
    for num_samples in (48, 480, 4800):
        (loader,) = Job(source, 6, 5).loaders(1, 8)
        loader.num_samples = num_samples
        for batch in islice(loader, 60):
            loader.commit(batch.record)
        assert 0.3 < bad_fraction(loader.totals) < 0.7  # the truth is one half


def test_rates_after_a_resume_are_those_since_the_resume():
    job = Job(NumberSource([30] * 6), 6, 5)
    job.run(1, 8, 3)
    (loader,) = job.loaders(1, 8)
    loader.totals["bytes_read"] = 10**15
    meter = DataMeter(loader, rank=0, budget=BadSampleBudget(1.0), sum_over_ranks=lambda x: x, gather=lambda x: [x])
    metrics = meter.measure(wait_s=0.0, elapsed_s=1.0, device=torch.device("cpu"))
    assert metrics["data/mb_per_second"] == 0.0


def test_the_counters_of_many_ranks_are_added_in_no_time():
    counters = [Counter({f"{rank}-{shard}": 1 for shard in range(20)}) for rank in range(1024)]
    start = time.perf_counter()
    assert add_counters(counters).total() == 20_480
    assert time.perf_counter() - start < 1


def test_metrics_are_rates_since_the_last_look_and_totals_since_the_beginning():
    before = Counter(read=100, bytes_read=10_000_000, decode_us=5_000)
    now = before + Counter(read=50, bytes_read=5_000_000, decode_us=10_000) + Counter({"skipped/no_image": 2})
    metrics = data_metrics(now, before=before, elapsed_s=2.0)
    assert metrics["data/read"] == 150
    assert metrics["data/mb_per_second"] == 2.5
    assert metrics["data/decode_us_per_sample"] == 200
    assert metrics["data/skipped/no_image"] == 2
    assert "data/skipped/broken_image" not in metrics


def test_the_meter_adds_up_ranks_and_names_the_slowest():
    job = Job(NumberSource([30] * 6), 6, 5, NumberDecoder(bad_every=6))
    loaders = job.loaders(2, 8)
    for loader in loaders:
        loader.commit(next(iter(loader)).record)
    vectors: list[torch.Tensor] = []

    def meter(rank: int, sum_over_ranks) -> DataMeter:
        return DataMeter(
            loaders[rank], rank=rank, budget=BadSampleBudget(1.0), sum_over_ranks=sum_over_ranks, gather=lambda x: [x]
        )

    def give(vector: torch.Tensor) -> torch.Tensor:
        vectors.append(vector)
        return vector

    def other_rank(vector: torch.Tensor) -> torch.Tensor:
        return vector + vectors[0]

    meter(1, give).measure(wait_s=2.0, elapsed_s=4.0, device=torch.device("cpu"))
    metrics = meter(0, other_rank).measure(wait_s=0.5, elapsed_s=4.0, device=torch.device("cpu"))
    read = sum(loader.totals["read"] for loader in loaders)
    assert metrics["data/read"] == read > 16
    assert metrics["data/skipped/broken_image"] == read - 16
    assert (metrics["data/slowest_rank"], metrics["data/wait_s_slowest_rank"]) == (1.0, 2.0)
    assert metrics["data/rank_0/read"] + metrics["data/rank_1/read"] == read
    assert 0 <= metrics["data/epoch_min"] <= metrics["data/epoch"] <= metrics["data/epoch_max"] < 2


def test_totals_are_kept_over_a_resume_on_another_number_of_ranks():
    job = Job(NumberSource([30] * 6), 6, 5, NumberDecoder(bad_every=6))
    job.run(3, 4, 2)
    assert job.position is not None
    before = job.position.totals
    job.run(2, 4, 1)
    assert job.position.totals["read"] > before["read"] >= 24
    assert replace(job.position).bad_shards.total() == sum(
        count for name, count in job.position.totals.items() if name.startswith("skipped/")
    )
