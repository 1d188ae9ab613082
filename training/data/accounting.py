"""Counts what was read, left out, retried and waited for; ends a run whose data are bad beyond its budget.

Counters are integers by name (``Chunk.counts``). For a sum over ranks they are laid out as one vector, in a fixed
order that all ranks know without talking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from training.data.encoded_image import HOST_REASONS
from training.data.storage_errors import COUNTERS as STORAGE_COUNTERS
from training.resilience.exit_codes import BAD_DATA

UNUSABLE_REASONS = (
    "no_image",
    "no_caption",
    "empty_caption",
    "caption_not_utf8",
    "caption_too_long",
    "json_broken",
    "json_too_large",
    "image_too_large",
    "broken_image",
)
LOST_REASONS = ("shard_damaged", "shard_missing", "shard_changed", "shard_unreadable", "shard_empty")
COUNTERS = (
    "read",
    "lost_samples",
    "slots_ended",
    "slot_samples",
    *STORAGE_COUNTERS,
    "worker_restarts",
    "read_us",
    "decode_us",
    "tokenize_us",
    "device_decode_us",
    *(f"decoded_on_host/{reason}" for reason in HOST_REASONS),
    *(f"lost/{reason}" for reason in LOST_REASONS),
    *(f"skipped/{reason}" for reason in (*UNUSABLE_REASONS, "other")),
)
_FEWEST_SAMPLES = 1000
FEWEST_SLOTS = 20
_SHOWN_SHARDS = 5


class DataBudgetExceeded(SystemExit):
    """More of the data is unusable than ``--max-bad-samples`` allows; the exit code says: do not start again."""

    def __init__(self, message: str) -> None:
        super().__init__(BAD_DATA)
        self.message = message

    def __str__(self) -> str:
        return self.message


def to_vector(counts: Mapping[str, int], *, num_sources: int) -> list[float]:
    """The counters in the order of ``COUNTERS``, then samples by source."""
    known = set(COUNTERS)
    other = sum(count for name, count in counts.items() if name.startswith("skipped/") and name not in known)
    values = [float(counts.get(name, 0)) for name in COUNTERS]
    values[COUNTERS.index("skipped/other")] += other
    return values + [float(counts.get(f"source/{source}", 0)) for source in range(num_sources)]


def from_vector(values: Sequence[float]) -> Counter[str]:
    """The inverse of ``to_vector``."""
    counts = Counter({name: round(value) for name, value in zip(COUNTERS, values, strict=False) if value})
    for source, value in enumerate(values[len(COUNTERS) :]):
        counts[f"source/{source}"] = round(value)
    return counts


def skipped(counts: Mapping[str, int]) -> int:
    """Samples that were read and could not be used."""
    return sum(count for name, count in counts.items() if name.startswith("skipped/"))


def bad_fraction(counts: Mapping[str, int]) -> float:
    """Unusable samples among those there should have been; of lost shards, as many as a shard holds on average."""
    lost = counts.get("lost_samples", 0)
    return (skipped(counts) + lost) / max(1, counts.get("read", 0) + lost)


@dataclass(frozen=True)
class BadSampleBudget:
    """The limit of ``--max-bad-samples``.

    Args:
        limit: fraction of the samples that may be unusable.
        slots: the fraction is taken of the samples of at least so many, or the first bad shard would spend it alone.
    """

    limit: float
    slots: int = FEWEST_SLOTS

    def check(self, counts: Mapping[str, int], *, worst_shards: Callable[[], Counter[str]]) -> None:
        """
        Args:
            counts: of all ranks, so that all of them decide alike.
            worst_shards: bad samples by shard, of all ranks; asked only when the budget is spent.

        Raises:
            DataBudgetExceeded: with the reasons and the shards that contribute most.
        """
        bad = skipped(counts) + counts.get("lost_samples", 0)
        seen = counts.get("read", 0) + counts.get("lost_samples", 0)
        fewest = max(_FEWEST_SAMPLES, round(self.slots * mean_slot_samples(counts)))
        if bad <= self.limit * max(seen, fewest):
            return
        reasons = {
            name.partition("/")[2]: count for name, count in counts.items() if name.startswith(("skipped/", "lost/"))
        }
        worst = ", ".join(f"{shard} ({count})" for shard, count in worst_shards().most_common(_SHOWN_SHARDS))
        raise DataBudgetExceeded(
            f"{bad} of {seen} samples cannot be used, more than --max-bad-samples {self.limit} allows: {reasons}. "
            f"Worst shards: {worst}. `clipyard data inspect` shows why; raise --max-bad-samples (1: no limit) to go on "
            "with --resume latest."
        )


def mean_slot_samples(counts: Mapping[str, int]) -> float:
    """Samples of a slot on average, of those that have ended; 0 before one has."""
    return counts.get("slot_samples", 0) / max(1, counts.get("slots_ended", 0))


def data_metrics(counts: Mapping[str, int], *, before: Mapping[str, int], elapsed_s: float) -> dict[str, float]:
    """What is logged: totals since the run began, rates since ``before``, reasons that occurred."""
    read = counts.get("read", 0) - before.get("read", 0)
    metrics = {
        "data/read": float(counts.get("read", 0)),
        "data/bad_fraction": bad_fraction(counts),
        "data/gb_read": counts.get("bytes_read", 0) / 1e9,
        "data/mb_per_second": (counts.get("bytes_read", 0) - before.get("bytes_read", 0)) / 1e6 / elapsed_s,
    }
    for stage in ("read", "decode", "tokenize"):
        name = f"{stage}_us"
        metrics[f"data/{name}_per_sample"] = (counts.get(name, 0) - before.get(name, 0)) / max(1, read)
    if "device_decode_us" in counts:
        spent = counts["device_decode_us"] - before.get("device_decode_us", 0)
        metrics["data/device_decode_us_per_sample"] = spent / max(1, read)
    occurred = ("lost/", "skipped/", "decoded_on_host/", "retries", "cache_", "worker_restarts", "lost_samples")
    return metrics | {f"data/{name}": float(n) for name, n in counts.items() if n and name.startswith(occurred)}
