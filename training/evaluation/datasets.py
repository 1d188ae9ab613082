"""Opens and checks the data sets that a run is evaluated on, before it trains.

    DIR/classnames.txt                               ImageNet: DIR/<class folder>/**/*.jpeg   (sorted, 1000 of them)
    DIR/zeroshot_classification_templates.txt        ImageNetV2: DIR/{0..999}/*.jpeg
    DIR/test/nshards.txt
    DIR/test/{0..}.tar    .jpg + .cls, or .jpg + .txt (one caption per line) for retrieval

What is wrong ends the run here, on every rank, with the path and the flag.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from training.config import DataConfig
from training.data.build import read_table
from training.data.epoch import resolve_dataset_type
from training.data.shards import expand_shards, is_local
from training.distributed.start_up import on_first_rank, spread
from training.evaluation.prompts import Prompts, read_prompts
from training.evaluation.samples import (
    CsvPairs,
    IndexedTars,
    LabelledFolders,
    SampleSource,
    StreamedTars,
    folder_files,
)
from training.evaluation.tar_index import CaptionedReader, LabelledReader, RecordReader, TarRecord, index_tar

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_V2_SUBDIRECTORY = "ImageNetV2-matched-frequency"
_FILE_CHECKS = 100


class ClassificationSet(NamedTuple):
    """A labelled set, the prompts of its classes, and its name in metrics."""

    name: str
    source: SampleSource
    prompts: Prompts


class RetrievalSet(NamedTuple):
    """Images with captions, and the set's name in metrics."""

    name: str
    source: SampleSource


def split_directories(value: str | None, *, flag: str) -> list[str]:
    """The ``::``-joined directories of a flag. Their base names appear in metrics, so they must differ."""
    directories = [os.path.normpath(item) for item in (value or "").split("::") if item]
    names = [set_name(directory) for directory in directories]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{flag}: two directories are called {repeated[0]!r}, as their metrics would be: rename one.")
    return directories


def set_name(directory: str) -> str:
    """The name under which a set's metrics are reported."""
    return os.path.basename(os.path.normpath(directory))


def open_imagenet(directory: str, *, num_classes: int, rank: int) -> LabelledFolders:
    """``--imagenet-val``: one folder per class, whose sorted order is the order of the class names."""
    flag = "--imagenet-val"
    files = on_first_rank(lambda: _sorted_folders(directory, num_classes=num_classes, flag=flag), rank=rank)
    return LabelledFolders(files, flag=flag)


def open_imagenet_v2(directory: str, *, num_classes: int, rank: int) -> LabelledFolders:
    """``--imagenet-v2``: folders named by the class number, in the directory or its ImageNetV2-matched-frequency."""
    flag = "--imagenet-v2"
    files = on_first_rank(lambda: _numbered_folders(directory, num_classes=num_classes, flag=flag), rank=rank)
    return LabelledFolders(files, flag=flag)


def open_classification_set(directory: str, *, rank: int, world_size: int) -> ClassificationSet:
    """A webdataset classification set in CLIP_benchmark's layout (``--zeroshot-data``). Collective: all ranks."""
    flag = "--zeroshot-data"

    def check() -> tuple[Prompts, list[str]]:
        _check_type(directory, {"", "classification"}, flag=flag)
        paths = shard_paths(directory, flag=flag)
        return read_prompts(directory, flag=flag), paths

    prompts, paths = on_first_rank(check, rank=rank)
    reader = LabelledReader(num_classes=len(prompts.class_names))
    records = _index(paths, reader, flag=flag, rank=rank, world_size=world_size)
    return ClassificationSet(set_name(directory), IndexedTars(records, flag=flag), prompts)


def open_retrieval_set(directory: str, *, rank: int, world_size: int) -> RetrievalSet:
    """A webdataset retrieval set, several captions per image (``--retrieval-data``). Collective: all ranks."""
    flag = "--retrieval-data"

    def check() -> list[str]:
        _check_type(directory, {"", "retrieval"}, flag=flag)
        return shard_paths(directory, flag=flag)

    paths = on_first_rank(check, rank=rank)
    records = _index(paths, CaptionedReader(single=False), flag=flag, rank=rank, world_size=world_size)
    return RetrievalSet(set_name(directory), IndexedTars(records, flag=flag))


def open_validation_pairs(config: DataConfig, *, rank: int, world_size: int) -> SampleSource:
    """``--val-data``: a CSV, local shards (indexed now), or shards that can only be streamed. Collective: all ranks.

    Samples without an image or a caption are no pairs: they are left out, and counted in a warning.
    """
    flag = "--val-data"
    path = config.val_data
    assert path is not None
    kind = resolve_dataset_type(config, path, flag=flag)
    if kind in ("csv", "jsonl"):
        return on_first_rank(lambda: _open_table(config, path, kind, flag=flag), rank=rank)
    urls = on_first_rank(lambda: expand_shards(path, flag=flag).urls, rank=rank)
    images, texts = tuple(config.image_key.lower().split(";")), tuple(config.text_key.lower().split(";"))
    if not all(is_local(url) for url in urls):
        return StreamedTars(urls, image_extensions=images, text_extensions=texts, flag=flag)
    reader = CaptionedReader(single=True, image_extensions=images, text_extensions=texts)
    records = _index(urls, reader, flag=flag, rank=rank, world_size=world_size, strict=False)
    return IndexedTars(records, flag=flag)


def shard_paths(directory: str, *, flag: str) -> list[str]:
    """The tars of ``DIR/test``, as many as ``nshards.txt`` says.

    Raises:
        ValueError: no such directory, no tars, no number, or another number of tars.
    """
    test = os.path.join(directory, "test")
    if not os.path.isdir(test):
        missing = directory if not os.path.isdir(directory) else test
        raise ValueError(f"Evaluation set: directory {missing!r} does not exist: correct {flag}.")
    found = {name for name in os.listdir(test) if name.endswith(".tar")}
    if not found:
        raise ValueError(f"Evaluation set: {test!r} holds no .tar file: correct {flag}.")
    count_path = os.path.join(test, "nshards.txt")
    if not os.path.isfile(count_path):
        raise ValueError(f"{count_path!r} does not exist: write the number of shards into it, or correct {flag}.")
    with open(count_path, encoding="utf-8") as file:
        text = file.read().strip()
    if not text.isdigit():
        raise ValueError(f"{count_path!r} holds {text[:40]!r}, not a number of shards.")
    expected = [f"{number}.tar" for number in range(int(text))]
    if found != set(expected):
        odd = sorted(found.symmetric_difference(expected))
        raise ValueError(
            f"{count_path!r} says {text} shards (0.tar and on), but {test!r} has {len(found)} ({odd[0]} is missing or "
            "too many): complete the set."
        )
    return [os.path.join(test, name) for name in expected]


def _check_type(directory: str, allowed: set[str], *, flag: str) -> None:
    """``dataset_type.txt``, where there is one, must not name another kind of set."""
    path = os.path.join(directory, "dataset_type.txt")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        kind = file.read().strip()
    if kind in allowed:
        return
    if kind in ("classification", "retrieval"):
        other = "--retrieval-data" if kind == "retrieval" else "--zeroshot-data"
        raise ValueError(f"{directory!r} is a {kind} set: give it to {other}, not to {flag}.")
    raise ValueError(f"{path!r} says {kind[:40]!r}: {flag} takes sets with one class per image, or image-text pairs.")


def _index(
    paths: Sequence[str], reader: RecordReader, *, flag: str, rank: int, world_size: int, strict: bool = True
) -> list[TarRecord]:
    """Records of all tars in order. Each tar is read once, by one rank."""
    indices = spread(paths, lambda path: index_tar(path, reader), rank=rank, world_size=world_size)
    records = [record for index in indices for record in index.records]
    unfit = [fault for index in indices for fault in index.unfit]
    if unfit and strict:
        raise ValueError(f"{unfit[0]} {len(unfit)} such samples in all: repair the set, or correct {flag}.")
    if unfit and rank == 0:
        logger.warning("%s: %d samples are no pairs and are left out; the first: %s", flag, len(unfit), unfit[0])
    if not records:
        raise ValueError(f"The {len(paths)} shards of {flag} hold no usable sample (first shard {paths[0]!r}).")
    return records


def _open_table(config: DataConfig, path: str, kind: str, *, flag: str) -> CsvPairs:
    table = read_table(config, path, kind, flag=flag)
    pairs = CsvPairs(table, flag=flag)
    for row in range(0, len(table), -(-len(table) // _FILE_CHECKS)):
        if "jpg" not in table.read_row(row).members:
            raise ValueError(f"Row {row + 1} of {path!r}: image {table.images[row]!r} does not exist: correct {flag}.")
    if not pairs.num_samples:
        raise ValueError(f"{path!r} has no caption in any of its {len(table)} rows: correct --csv-caption-key.")
    return pairs


def _sorted_folders(directory: str, *, num_classes: int, flag: str) -> list[tuple[str, int]]:
    folders = sorted(_subdirectories(directory, flag=flag))
    if len(folders) != num_classes:
        raise ValueError(
            f"{directory!r} has {len(folders)} class folders, ImageNet has {num_classes}: correct {flag}, or give "
            "another data set to --zeroshot-data."
        )
    return _labelled_files(directory, folders, flag=flag)


def _numbered_folders(directory: str, *, num_classes: int, flag: str) -> list[tuple[str, int]]:
    nested = os.path.join(directory, _V2_SUBDIRECTORY)
    if os.path.isdir(nested):
        directory = nested
    folders = _subdirectories(directory, flag=flag)
    expected = [str(number) for number in range(num_classes)]
    if set(folders) != set(expected):
        raise ValueError(
            f"{directory!r} has {len(folders)} folders, not the folders 0 to {num_classes - 1} of ImageNetV2: correct "
            f"{flag}, or give another data set to --zeroshot-data."
        )
    return _labelled_files(directory, expected, flag=flag)


def _subdirectories(directory: str, *, flag: str) -> list[str]:
    if not os.path.isdir(directory):
        raise ValueError(f"Directory {directory!r} does not exist: correct {flag}.")
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


def _labelled_files(directory: str, folders: Sequence[str], *, flag: str) -> list[tuple[str, int]]:
    files: list[tuple[str, int]] = []
    for label, folder in enumerate(folders):
        found = folder_files(os.path.join(directory, folder), _IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"Class folder {os.path.join(directory, folder)!r} holds no image: correct {flag}.")
        files += [(path, label) for path in found]
    return files
