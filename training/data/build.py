"""Builds the training and validation data of a run from its configuration."""

from __future__ import annotations

import hashlib
import math

from models.config import PreprocessConfig
from models.tokenizer import Tokenizer
from training.config import DataConfig, ImageConfig
from training.data.csv_reader import CsvSource, CsvTable
from training.data.decode import SampleDecoder
from training.data.lanes import Source
from training.data.loader import StreamConfig, TrainLoader
from training.data.shards import ShardList, expand_shards, require_num_samples
from training.data.sources import SyntheticSource, TarSource
from training.data.transforms import build_train_transform

_LANES_PER_WORKER = 4
"""Shards a worker reads at a time: samples of one batch come from several, at the price of so many open files."""


def resolve_dataset_type(config: DataConfig, path: str, *, flag: str) -> str:
    """``auto`` decides by the extension, as OpenCLIP does, and knows ``pipe:`` commands and globs as well."""
    if config.dataset_type != "auto":
        return config.dataset_type
    extension = path.rsplit(".", 1)[-1].lower()
    if extension in ("csv", "tsv"):
        return "csv"
    if path.startswith("pipe:") or extension == "tar" or "tar" in extension.split():
        return "webdataset"
    raise ValueError(f"Cannot tell the type of {path!r} given to {flag}: pass --dataset-type webdataset or csv.")


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
    pin_memory: bool = False,
) -> TrainLoader:
    """The loader of ``--train-data``; everything that is wrong with the data's description is reported here.

    Raises:
        ValueError: no such data, an unknown number of samples, or too little data for the ranks and workers.
    """
    num_workers = max(1, config.workers)
    streams = world_size * num_workers
    source, num_lanes, num_samples, digest = _build_source(config, preprocess=preprocess, streams=streams, seed=seed)
    num_batches, epoch_samples = epoch_length(
        config, num_samples=num_samples, world_size=world_size, kind=_type(config)
    )
    if num_batches < accum_freq or num_samples < config.batch_size * world_size:
        raise ValueError(
            f"{num_samples} samples are fewer than one global batch of "
            f"{config.batch_size * world_size * accum_freq} ({config.batch_size} per rank x {world_size} ranks x "
            f"{accum_freq} micro-steps): lower --batch-size or --accum-freq, or raise --train-num-samples."
        )
    return TrainLoader(
        source,
        config=StreamConfig(
            seed=seed,
            num_lanes=num_lanes,
            block=config.shuffle_block or 512,
            world_size=world_size,
            num_workers=num_workers,
            batch_size=config.batch_size,
            sources=digest,
        ),
        rank=rank,
        decoder=SampleDecoder(
            transform=build_train_transform(preprocess, image.aug_cfg),
            image_key=config.image_key,
            text_key=config.text_key,
            max_image_pixels=config.max_image_pixels,
        ),
        tokenizer=tokenizer,
        num_batches=num_batches,
        num_samples=epoch_samples,
        processes=config.workers > 0,
        pin_memory=pin_memory,
    )


def _type(config: DataConfig) -> str:
    if config.train_data is None:
        if config.dataset_type == "synthetic":
            return "synthetic"
        raise ValueError("No training data: pass --train-data, or --dataset-type synthetic for a run without any.")
    return resolve_dataset_type(config, config.train_data, flag="--train-data")


def _build_source(
    config: DataConfig, *, preprocess: PreprocessConfig, streams: int, seed: int
) -> tuple[Source, int, int, str]:
    """(source, number of lanes, samples per epoch, digest of what is read)."""
    kind = _type(config)
    if kind == "synthetic":
        num_samples = config.train_num_samples
        if not num_samples:
            raise ValueError("--dataset-type synthetic has no end: pass --train-num-samples.")
        size = preprocess.size
        source = SyntheticSource(image_size=size, num_samples=num_samples, seed=seed)
        return source, streams, num_samples, f"synthetic {size}"
    assert config.train_data is not None
    if kind == "csv":
        table = CsvTable(
            config.train_data,
            separator=config.csv_separator,
            image_column=config.csv_img_key,
            caption_column=config.csv_caption_key,
            flag="--train-data",
        )
        digest = hashlib.sha256(f"{config.train_data} {len(table)}".encode()).hexdigest()
        return CsvSource(table, num_lanes=streams, seed=seed), streams, len(table), digest
    shards = expand_shards(config.train_data, upsampling_factors=config.train_data_upsampling_factors)
    num_samples = require_num_samples(config.train_num_samples, shards, flag="--train-num-samples")
    num_lanes = streams * _lanes_per_worker(shards, resampled=config.dataset_resampled, streams=streams)
    return TarSource(shards, resampled=config.dataset_resampled, seed=seed), num_lanes, num_samples, shards.digest


def _lanes_per_worker(shards: ShardList, *, resampled: bool, streams: int) -> int:
    if resampled:
        return _LANES_PER_WORKER
    if len(shards.urls) < streams:
        raise ValueError(
            f"{len(shards.urls)} shards for {streams} loader workers (all ranks together), so some would have none of "
            f"an epoch: pass fewer --workers, or --dataset-resampled."
        )
    return min(_LANES_PER_WORKER, len(shards.urls) // streams)


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
