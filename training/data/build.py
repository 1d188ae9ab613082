"""Builds the training data of a run from its configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from torch import Tensor

from models.config import PreprocessConfig
from models.tokenizer import Tokenizer
from training.config import DataConfig, ImageConfig
from training.data.csv_reader import CsvSource, CsvTable
from training.data.decode import SampleDecoder
from training.data.identity import SourceDigests, digest_sources
from training.data.jsonl_reader import JsonlTable
from training.data.lane_reader import Source
from training.data.lanes import Deal
from training.data.loader import TrainLoader
from training.data.manifest import read_manifest
from training.data.position import StreamIdentity
from training.data.shards import expand_shards, require_num_samples
from training.data.sources import SyntheticSource, TarSource
from training.data.storage import Storage, StorageOptions
from training.data.transforms import build_train_transform

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


def build_train_loader(
    config: DataConfig,
    image: ImageConfig,
    *,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer,
    rank: int,
    world_size: int,
    accum_freq: int,
    seed: int,
    pin: Callable[[Tensor], Callable[[], None]] | None = None,
) -> TrainLoader:
    """The loader of ``--train-data``; everything that is wrong with the data's description is reported here.

    Args:
        pin: makes memory page-locked for copies to the device.

    Raises:
        ValueError: no such data, an unknown number of samples, or too little data for the ranks.
    """
    source, num_samples, digests = _build_source(config, preprocess=preprocess, seed=seed)
    num_batches, epoch_samples = epoch_length(
        config, num_samples=num_samples, world_size=world_size, kind=_type(config)
    )
    if num_batches < accum_freq or num_samples < config.batch_size * world_size:
        raise ValueError(
            f"{num_samples} samples are fewer than one global batch of "
            f"{config.batch_size * world_size * accum_freq} ({config.batch_size} per rank x {world_size} ranks x "
            f"{accum_freq} micro-steps): lower --batch-size or --accum-freq, or raise --train-num-samples."
        )
    num_lanes = _num_lanes(config, source, world_size=world_size)
    block = config.shuffle_block or choose_block(num_lanes, world_size=world_size)
    return TrainLoader(
        source,
        identity=StreamIdentity(
            seed,
            config.dataset_resampled,
            *digests,
            slots_per_epoch=source.slots_per_epoch,
            slot_samples=num_samples / source.slots_per_epoch,
        ),
        deal=Deal(num_lanes, block, seed),
        rank=rank,
        world_size=world_size,
        batch_size=config.batch_size,
        image_size=preprocess.size,
        decoder=SampleDecoder(
            transform=build_train_transform(preprocess, image.aug_cfg, decode=config.decode),
            image_key=config.image_key,
            text_key=config.text_key,
            max_image_pixels=config.max_image_pixels,
            json_text_key=config.json_text_key,
            json_text_key_probs=config.json_text_key_probs,
        ),
        tokenizer=tokenizer,
        num_workers=config.workers,
        num_batches=num_batches,
        num_samples=epoch_samples,
        requested_lanes=config.data_lanes,
        requested_block=config.shuffle_block,
        pin=pin,
    )


def _num_lanes(config: DataConfig, source: Source, *, world_size: int) -> int:
    slots = source.slots_per_epoch
    if not config.data_lanes:
        if config.dataset_resampled:  # a slot reads any shard, so that lanes may be more than shards
            slots = max(slots, _FEWEST_LANES_PER_RANK * world_size)
        return choose_lanes(slots, world_size=world_size)
    if config.data_lanes < world_size:
        raise ValueError(f"{config.data_lanes} lanes for {world_size} ranks: raise --data-lanes, or leave it out.")
    if config.data_lanes > slots and not config.dataset_resampled:
        raise ValueError(
            f"{config.data_lanes} lanes for {slots} slots of data, so some would have none of an epoch: pass "
            f"--data-lanes {slots} or fewer, or --dataset-resampled."
        )
    return config.data_lanes


def has_train_data(config: DataConfig) -> bool:
    """Whether there is anything to train on; without, a run only evaluates."""
    return bool(config.train_data or config.train_data_manifest) or config.dataset_type == "synthetic"


def _type(config: DataConfig) -> str:
    if config.train_data_manifest is not None:
        return "webdataset"
    if config.train_data is None:
        if config.dataset_type == "synthetic":
            return "synthetic"
        raise ValueError("No training data: pass --train-data, or --dataset-type synthetic for a run without any.")
    return resolve_dataset_type(config, config.train_data, flag="--train-data")


def _build_source(config: DataConfig, *, preprocess: PreprocessConfig, seed: int) -> tuple[Source, int, SourceDigests]:
    """(source, samples per epoch, digests of what is read)."""
    kind = _type(config)
    if kind == "synthetic":
        return _synthetic_source(config, preprocess=preprocess, seed=seed)
    if config.train_data_manifest is not None:
        return _manifest_source(config, config.train_data_manifest, seed=seed)
    assert config.train_data is not None
    if kind != "webdataset":
        table = read_table(config, config.train_data, kind, flag="--train-data")
        return CsvSource(table, seed=seed), len(table), SourceDigests(table.digest)
    shards = expand_shards(config.train_data, upsampling_factors=config.train_data_upsampling_factors)
    num_samples = require_num_samples(config.train_num_samples, shards, flag="--train-num-samples")
    parts = 1 if config.dataset_resampled else choose_parts(len(shards.urls))
    storage = Storage(storage_options(config))
    source = TarSource(shards, resampled=config.dataset_resampled, seed=seed, storage=storage, parts=parts)
    return source, num_samples, digest_sources(shards, sources=shards.digest, weights=json.dumps(shards.weights))


def _synthetic_source(
    config: DataConfig, *, preprocess: PreprocessConfig, seed: int
) -> tuple[Source, int, SourceDigests]:
    num_samples = config.train_num_samples
    if not num_samples:
        raise ValueError("--dataset-type synthetic has no end: pass --train-num-samples.")
    size = preprocess.size
    source = SyntheticSource(image_size=size, num_samples=num_samples, seed=seed)
    return source, num_samples, SourceDigests(f"synthetic {size} {num_samples}")


def _manifest_source(config: DataConfig, path: str, *, seed: int) -> tuple[Source, int, SourceDigests]:
    manifest = read_manifest(path)
    if manifest.needs_resampling and not config.dataset_resampled:
        raise ValueError(f"The weights in --train-data-manifest {path} need --dataset-resampled: pass it too.")
    num_samples = config.train_num_samples or manifest.num_samples
    if not num_samples:
        raise ValueError(
            f"The number of samples in --train-data-manifest {path} is unknown: give every source num_samples, or pass "
            "--train-num-samples."
        )
    shards = manifest.shards
    # A schedule counts epochs of the run, which with --train-num-samples need not be passes over all shards.
    passes = num_samples / (manifest.num_samples or num_samples)
    source = TarSource(
        shards,
        resampled=config.dataset_resampled,
        seed=seed,
        storage=Storage(storage_options(config)),
        parts=1 if config.dataset_resampled else choose_parts(len(shards.urls)),
        schedule=manifest.schedule if config.dataset_resampled else None,
        slots_per_epoch=max(1, round(passes * len(shards.urls))) if config.dataset_resampled else None,
    )
    return source, num_samples, digest_sources(shards, sources=manifest.digest, weights=manifest.weighting)


def read_table(config: DataConfig, path: str, kind: str, *, flag: str) -> CsvTable:
    """The table of a ``csv`` or ``jsonl`` file that ``flag`` names.

    Raises:
        ValueError: the file or a column is missing, or a row is none.
    """
    if kind == "jsonl":
        return JsonlTable(path, image_key=config.csv_img_key, caption_key=config.csv_caption_key, flag=flag)
    return CsvTable(
        path,
        separator=config.csv_separator,
        image_column=config.csv_img_key,
        caption_column=config.csv_caption_key,
        flag=flag,
    )


def storage_options(config: DataConfig) -> StorageOptions:
    """How shards are fetched, as the flags say."""
    return StorageOptions(s3_native=config.s3_native == "on", cache_dir=config.cache_shards, cache_gib=config.cache_gib)


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
