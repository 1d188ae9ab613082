"""How long an epoch is, and how it is dealt to lanes: arithmetic on settings and counts, without torch.

The trainer deals by it, and ``clipyard submit`` plans by it.
"""

from __future__ import annotations

import math

from training.config import DataConfig

LANES_PER_RANK = 48
"""With enough data. Divisible by 2, 3, 4, 6, 8, 12, 16, 24: on so many times the ranks each still has whole lanes."""
_FEWEST_LANES_PER_RANK = 12
_MOST_PARTS = 4
"""Of a shard. Every part of a remote shard may read over what the others need."""
_BLOCK_SAMPLES_PER_RANK = 4096
"""Lanes times block. With 48 lanes, neighbours of a shard meet in a batch about as often as with OpenCLIP's buffer of
5,000 samples, in less memory."""
_LARGEST_BLOCK = 2048


def resolve_dataset_type(config: DataConfig, path: str, *, flag: str) -> str:
    """``auto`` decides by the extension, as OpenCLIP does, and knows ``pipe:`` commands and globs as well."""
    if config.dataset_type != "auto":
        return config.dataset_type
    extension = path.rsplit(".", 1)[-1].lower()
    if extension in ("csv", "tsv"):
        return "csv"
    if extension in ("jsonl", "ndjson"):
        return "jsonl"
    if path.startswith("pipe:") or extension == "tar" or "tar" in extension.split():
        return "webdataset"
    raise ValueError(f"Cannot tell the type of {path!r} given to {flag}: pass --dataset-type webdataset, csv or jsonl.")


def choose_parts(num_shards: int) -> int:
    """Into how many slots each shard is cut: 1 from 48 shards on, at most 4; whatever the number of ranks."""
    return min(_MOST_PARTS, -(-LANES_PER_RANK // num_shards))


def choose_lanes(slots_per_epoch: int, *, world_size: int) -> int:
    """How many lanes a new run has: 48 per rank; with less data one per slot, or as many as divide among the ranks.

    What a lane costs: an open shard, a block of undecoded samples, 20 bytes in every checkpoint.

    Raises:
        ValueError: fewer slots than ranks.
    """
    per_rank = min(LANES_PER_RANK, slots_per_epoch // world_size)
    if per_rank == 0:
        raise ValueError(
            f"{slots_per_epoch} slots of data (shards, or parts of them) for {world_size} ranks: pass "
            "--dataset-resampled, use fewer ranks, or write more and smaller shards."
        )
    if per_rank < LANES_PER_RANK and slots_per_epoch % world_size == 0:
        return slots_per_epoch
    return per_rank * world_size


def choose_block(num_lanes: int, *, world_size: int) -> int:
    """Samples that a lane shuffles among each other, so that a rank shuffles 4,096."""
    return max(1, min(_LARGEST_BLOCK, _BLOCK_SAMPLES_PER_RANK * world_size // num_lanes))


def lanes_of(config: DataConfig, slots_per_epoch: int, *, world_size: int) -> int:
    """How many lanes a new run has: ``--data-lanes``, or what ``choose_lanes`` says.

    Raises:
        ValueError: the ranks do not get a lane each, or lanes would have no data.
    """
    if not config.data_lanes:
        if config.dataset_resampled:  # a slot reads any shard, so that lanes may be more than shards
            slots_per_epoch = max(slots_per_epoch, _FEWEST_LANES_PER_RANK * world_size)
        return choose_lanes(slots_per_epoch, world_size=world_size)
    if config.data_lanes < world_size:
        raise ValueError(f"{config.data_lanes} lanes for {world_size} ranks: raise --data-lanes, or leave it out.")
    if config.data_lanes > slots_per_epoch and not config.dataset_resampled:
        raise ValueError(
            f"{config.data_lanes} lanes for {slots_per_epoch} slots of data, so some would have none of an epoch: pass "
            f"--data-lanes {slots_per_epoch} or fewer, or --dataset-resampled."
        )
    return config.data_lanes


def has_train_data(config: DataConfig) -> bool:
    """Whether there is anything to train on; without, a run only evaluates."""
    return bool(config.train_data or config.train_data_manifest) or config.dataset_type == "synthetic"


def train_data_type(config: DataConfig) -> str:
    """webdataset, csv, jsonl or synthetic.

    Raises:
        ValueError: none is given, or its type cannot be told.
    """
    if config.train_data_manifest is not None:
        return "webdataset"
    if config.train_data is None:
        if config.dataset_type == "synthetic":
            return "synthetic"
        raise ValueError("No training data: pass --train-data, or --dataset-type synthetic for a run without any.")
    return resolve_dataset_type(config, config.train_data, flag="--train-data")


def epoch_length(config: DataConfig, *, num_samples: int, world_size: int, kind: str) -> tuple[int, int]:
    """(batches per rank, samples of all ranks) in an epoch, by OpenCLIP's arithmetic.

    Webdataset: rounded up to a whole number of batches of every worker; otherwise: rounded down to whole batches.
    """
    if kind == "webdataset":
        workers = max(1, config.workers)
        global_batches = math.ceil(num_samples / (config.batch_size * world_size))
        num_batches = math.ceil(global_batches / workers) * workers
        return num_batches, num_batches * config.batch_size * world_size
    return math.ceil(num_samples / world_size) // config.batch_size, num_samples


def check_epoch(num_samples: int, num_batches: int, *, batch_size: int, world_size: int, accum_freq: int) -> None:
    """Raises ValueError where an epoch has not one global batch."""
    if num_batches < accum_freq or num_samples < batch_size * world_size:
        raise ValueError(
            f"{num_samples} samples are fewer than one global batch of {batch_size * world_size * accum_freq} "
            f"({batch_size} per rank x {world_size} ranks x {accum_freq} micro-steps): lower --batch-size or "
            "--accum-freq, or raise --train-num-samples."
        )
