"""Adds up what the loaders of all ranks have done, and turns it into the numbers that are logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.data.accounting import BadSampleBudget, data_metrics, from_vector, skipped, to_vector
from training.data.loader import TrainLoader
from training.data.position import add_counters

RANK_COLUMNS = (
    *("read", "skipped", "retries", "bytes_read", "wait_s", "compute_s"),
    *("epoch_min", "epoch_mean", "epoch_max"),
)
_RANKS_SHOWN_ONE_BY_ONE = 8


class DataMeter:
    """Reads one rank's loader; ``measure`` is collective."""

    def __init__(
        self,
        loader: TrainLoader,
        *,
        rank: int,
        budget: BadSampleBudget,
        sum_over_ranks: Callable[[Tensor], Tensor],
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self._loader = loader
        self._rank = rank
        self._budget = budget
        self._sum = sum_over_ranks
        self._gather = gather
        self._before = Counter(loader.totals)  # of a resumed run, what was counted before
        self._by_rank = torch.zeros(loader.world_size, len(RANK_COLUMNS), dtype=torch.float64)

    def measure(
        self, *, wait_s: float, elapsed_s: float, device: torch.device, compute_s: float = 0.0
    ) -> dict[str, float]:
        """Totals of the run, rates since the last call, and what each rank did. Collective: all ranks.

        Args:
            compute_s: what this rank computed by itself; only passed on, to ``of_ranks``.

        Raises:
            DataBudgetExceeded: on all ranks alike.
        """
        loader = self._loader
        names = loader.source.source_names
        by_rank = torch.zeros(loader.world_size, len(RANK_COLUMNS), dtype=torch.float64)
        by_rank[self._rank] = torch.tensor(self._row(wait_s, compute_s))
        totals = torch.tensor(to_vector(loader.totals, num_sources=len(names)), dtype=torch.float64)
        # One collective, one host sync. At 1,024 ranks: 74 kB.
        summed = self._sum(torch.cat([totals, by_rank.flatten()]).to(device)).cpu()
        counts = from_vector(summed[: len(totals)].tolist())
        self._budget.check(counts, worst_shards=self._worst_shards)
        metrics = data_metrics(counts, before=self._before, elapsed_s=elapsed_s)
        self._before = counts
        if len(names) > 1:
            metrics |= {f"data/source/{name}": float(counts[f"source/{i}"]) for i, name in enumerate(names)}
        self._by_rank = summed[len(totals) :].view_as(by_rank)
        return metrics | _rank_metrics(self._by_rank)

    def of_ranks(self, column: str) -> list[float]:
        """One of ``RANK_COLUMNS`` as last measured, in rank order; on every rank."""
        values: list[float] = self._by_rank[:, RANK_COLUMNS.index(column)].tolist()
        return values

    def _row(self, wait_s: float, compute_s: float) -> Sequence[float]:
        totals = self._loader.totals
        lanes = self._loader.epoch_of_lanes()
        return (totals["read"], skipped(totals), totals["retries"], totals["bytes_read"], wait_s, compute_s, *lanes)

    def _worst_shards(self) -> Counter[str]:
        return add_counters(self._gather(self._loader.position().bad_shards))


def _rank_metrics(by_rank: Tensor) -> dict[str, float]:
    column = {name: by_rank[:, index] for index, name in enumerate(RANK_COLUMNS)}
    metrics = {
        "data/epoch": column["epoch_mean"].mean().item(),
        "data/epoch_min": column["epoch_min"].min().item(),
        "data/epoch_max": column["epoch_max"].max().item(),
        "data/wait_s_slowest_rank": column["wait_s"].max().item(),
        "data/slowest_rank": float(column["wait_s"].argmax()),
    }
    if 1 < len(by_rank) <= _RANKS_SHOWN_ONE_BY_ONE:
        for rank in range(len(by_rank)):
            for name in ("read", "skipped", "retries", "bytes_read", "wait_s"):
                metrics[f"data/rank_{rank}/{name}"] = column[name][rank].item()
    return metrics
