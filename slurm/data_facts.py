"""Looks at the training data as the trainer will, without torch: how many samples and slots, how large a sample is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import braceexpand

from training.config import DataConfig
from training.data.csv_reader import CsvTable
from training.data.epoch import choose_parts, train_data_type
from training.data.manifest import read_manifest
from training.data.shards import ShardList, count_samples, expand_shards, is_local, storage_location
from training.data.sources import SyntheticSource, slot_rows

_SHARDS_LOOKED_AT = 32


@dataclass(frozen=True)
class DataFacts:
    """What the plan needs to know about ``--train-data``."""

    kind: str
    """webdataset, csv, jsonl or synthetic."""
    num_samples: int
    """In an epoch."""
    slots: int
    """Shards, or parts of them, or runs of rows, in an epoch."""
    num_shards: int = 0
    first_shard: str | None = None
    sample_bytes: float | None = None
    """Measured on local shards; None where that cannot be seen from here."""


def read_data_facts(data: DataConfig, *, visible: bool = True) -> DataFacts:
    """Reads what lies beside the shards, and nothing of what is in them.

    Args:
        visible: False if only compute nodes see the data, so that the flags alone must tell.

    Raises:
        ValueError: no such data, or an unknown number of samples.
    """
    kind = train_data_type(data)
    if not visible and kind != "synthetic":
        return _facts_from_flags(data, kind)
    if kind == "synthetic":
        num_samples = data.train_num_samples
        assert num_samples is not None  # training.validation has seen to it
        source = SyntheticSource(image_size=(1, 1), num_samples=num_samples, seed=0)
        return DataFacts(kind, num_samples, source.slots_per_epoch, sample_bytes=0.0)
    if data.train_data_manifest is not None:
        return _manifest_facts(data, data.train_data_manifest)
    assert data.train_data is not None
    if kind == "webdataset":
        return _shard_facts(data, expand_shards(data.train_data, upsampling_factors=data.train_data_upsampling_factors))
    rows = _count_rows(data, data.train_data, kind)
    return DataFacts(kind, rows, -(-rows // slot_rows(rows)))


def _shard_facts(data: DataConfig, shards: ShardList) -> DataFacts:
    # Beside remote shards nothing is read that the flags say already.
    local = all(is_local(url) for url in shards.urls[:1])
    counted = count_samples(shards) if local or not data.train_num_samples else None
    num_samples = data.train_num_samples or counted
    if not num_samples:
        raise ValueError(
            f"The number of samples in {len(shards.urls)} shards is unknown (no complete sizes.json beside "
            f"{shards.urls[0]!r}): pass --train-num-samples."
        )
    slots = len(shards.urls) * (1 if data.dataset_resampled else choose_parts(len(shards.urls)))
    return DataFacts(
        "webdataset",
        num_samples,
        slots,
        num_shards=len(shards.urls),
        first_shard=shards.urls[0],
        sample_bytes=_sample_bytes(shards, counted or (None if data.dataset_resampled else num_samples)),
    )


def _facts_from_flags(data: DataConfig, kind: str) -> DataFacts:
    pattern = data.train_data
    if kind != "webdataset" or pattern is None or data.train_num_samples is None:
        raise ValueError(
            "--data-elsewhere leaves only the flags to plan from: give the shards with --train-data, and their samples "
            "with --train-num-samples."
        )
    urls = [url for source in pattern.split("::") if source for url in braceexpand.braceexpand(source)]
    if any(set(url) & set("*?[") or (is_local(url) and not url.endswith(".tar")) for url in urls):
        raise ValueError(
            f"--train-data {pattern}: how many shards that is cannot be told without seeing them (--data-elsewhere). "
            "Write a brace range, such as /data/{00000..00999}.tar."
        )
    slots = len(urls) * (1 if data.dataset_resampled else choose_parts(len(urls)))
    return DataFacts(kind, data.train_num_samples, slots, num_shards=len(urls), first_shard=urls[0])


def _manifest_facts(data: DataConfig, path: str) -> DataFacts:
    manifest = read_manifest(path)
    if manifest.needs_resampling and not data.dataset_resampled:
        raise ValueError(f"The weights in --train-data-manifest {path} need --dataset-resampled: pass it too.")
    num_samples = data.train_num_samples or manifest.num_samples
    if not num_samples:
        raise ValueError(
            f"The number of samples in --train-data-manifest {path} is unknown: give every source num_samples, or pass "
            "--train-num-samples."
        )
    shards = manifest.shards
    passes = num_samples / (manifest.num_samples or num_samples)
    slots = max(1, round(passes * len(shards.urls))) if data.dataset_resampled else 0
    return DataFacts(
        "webdataset",
        num_samples,
        slots or len(shards.urls) * choose_parts(len(shards.urls)),
        num_shards=len(shards.urls),
        first_shard=shards.urls[0],
        sample_bytes=_sample_bytes(shards, manifest.num_samples),
    )


def _count_rows(data: DataConfig, path: str, kind: str) -> int:
    if kind == "csv":
        table = CsvTable(
            path,
            separator=data.csv_separator,
            image_column=data.csv_img_key,
            caption_column=data.csv_caption_key,
            flag="--train-data",
        )
        return len(table)
    try:
        with open(path, "rb") as file:
            rows = sum(1 for line in file if line.strip())
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read ({error.strerror}): correct --train-data.") from error
    if not rows:
        raise ValueError(f"{path!r} has no rows: correct --train-data.")
    return rows


def _sample_bytes(shards: ShardList, num_samples: int | None) -> float | None:
    """From the sizes of some local shards, spread over the list; None where a size or the count is unknown."""
    stride = max(1, len(shards.urls) // _SHARDS_LOOKED_AT)
    looked_at = shards.urls[::stride][:_SHARDS_LOOKED_AT]
    if not num_samples or not all(is_local(url) for url in looked_at):
        return None
    try:
        sizes = [os.path.getsize(url) for url in looked_at]
    except OSError:
        return None
    return sum(sizes) / len(sizes) * len(shards.urls) / num_samples


def is_on_s3(url: str | None) -> bool:
    """Whether a shard, or what a ``pipe:`` command copies, lies on S3."""
    location = storage_location(url) if url is not None else None
    return location is not None and location.startswith(("s3://", "s3a://", "s3n://"))
