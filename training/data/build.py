"""Builds the training data of a run from its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from models.config import PreprocessConfig
from models.tokenizer import Tokenizer
from training.config import DataConfig, ImageConfig
from training.data.csv_reader import CsvSource, CsvTable
from training.data.decode import SampleDecoder
from training.data.encoded_image import file_room
from training.data.epoch import check_epoch, choose_block, choose_parts, epoch_length, lanes_of, train_data_type
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
    epoch_batch: int | None = None,
    pin: Callable[[Tensor], Callable[[], None]] | None = None,
) -> TrainLoader:
    """The loader of ``--train-data``; everything that is wrong with the data's description is reported here.

    Args:
        epoch_batch: batch size by which the length of an epoch is rounded, where that is another.
        pin: makes memory page-locked for copies to the device.

    Raises:
        ValueError: no such data, an unknown number of samples, or too little data for the ranks.
    """
    source, num_samples, digests = _build_source(config, preprocess=preprocess, seed=seed)
    by_epoch = replace(config, batch_size=epoch_batch or config.batch_size)
    num_batches, epoch_samples = epoch_length(
        by_epoch, num_samples=num_samples, world_size=world_size, kind=train_data_type(config)
    )
    check_epoch(num_samples, num_batches, batch_size=by_epoch.batch_size, world_size=world_size, accum_freq=accum_freq)
    num_lanes = lanes_of(config, source.slots_per_epoch, world_size=world_size)
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
        file_room=file_room(preprocess.size) if config.decode == "gpu" else 0,
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


def _build_source(config: DataConfig, *, preprocess: PreprocessConfig, seed: int) -> tuple[Source, int, SourceDigests]:
    """(source, samples per epoch, digests of what is read)."""
    kind = train_data_type(config)
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
    return source, num_samples, SourceDigests(f"synthetic {num_samples}")


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
