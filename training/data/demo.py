"""Write the demo data set: shards to train on, and held-out sets for validation, zero-shot and retrieval.

    DIR/
      train/000.tar ...  sizes.json           webdataset shards: KEY.jpg + KEY.txt
      val/000.tar 001.tar  sizes.json         held-out scenes, same format
      zeroshot/                               CLIP_benchmark's webdataset layout, classification
        classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
        test/0.tar 1.tar  nshards.txt         KEY.jpg + KEY.cls
      retrieval/                              the same, retrieval
        dataset_type.txt
        test/0.tar  nshards.txt               KEY.jpg + KEY.txt, one caption per line
      csv/train.csv val.csv  images/...       tab separated: filepath, title
      manifest.json                           the arguments and the files; written last

Everything is written beside DIR first and renamed into place, so DIR is complete or not there.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import webdataset

from training.data.demo_samples import CLASS_NAMES, DemoSample, DemoSpec, draw_samples

FORMAT = 1
"""Raised when the same arguments would give other bytes, so that an old set is not taken for a new one."""
MANIFEST = "manifest.json"
TEMPLATES = ("a {c}", "a {c}.", "a photo of a {c}.", "a picture of a {c}", "an image of a {c}.", "{c} icon")
CHUNK = 256
"""Samples per task of a drawing process."""


def make_demo_data(directory: Path, spec: DemoSpec, *, processes: int = 1) -> bool:
    """Write the whole set into `directory`, which must be empty or new; False if it is there already.

    Args:
        processes: drawing processes; the bytes do not depend on it.

    Raises:
        ValueError: the directory holds something else, or another demo set, or a damaged one.
    """
    directory = directory.absolute()
    if is_finished(directory, spec):
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        staging.chmod(0o755)  # mkdtemp makes it private; a data set is for others too
        with _pool(processes) as pool:
            _write_all(staging, spec, pool)
        _write_manifest(staging, spec)
        return _move_into_place(staging, directory, spec)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, directory: Path, spec: DemoSpec) -> bool:
    """False if another process was faster with the same set; with anything else there, the error of `is_finished`."""
    try:
        os.rename(staging, directory)  # atomic; replaces an empty directory and nothing else
    except OSError:
        if is_finished(directory, spec):
            return False
        raise
    return True


def is_finished(directory: Path, spec: DemoSpec) -> bool:
    """Whether the directory holds exactly this set; False if it is new or empty.

    Raises:
        ValueError: it holds anything else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    manifest = directory / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{directory} is not empty and not a demo data set: pass a new directory, or empty this one")
    recorded = json.loads(manifest.read_text())
    wanted = {"format": FORMAT, "arguments": asdict(spec)}
    if {name: recorded.get(name) for name in wanted} != wanted:
        raise ValueError(
            f"{directory} holds a demo data set made with {_as_flags(recorded.get('arguments') or {})} (format "
            f"{recorded.get('format')}), not with {_as_flags(asdict(spec))} (format {FORMAT}): pass another "
            "directory, or remove this one"
        )
    damaged = [name for name, size in recorded["files"].items() if _file_size(directory / name) != size]
    if damaged:
        raise ValueError(f"{directory} is damaged ({damaged[0]} is missing or cut): remove it and run this again")
    return True


def _file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _as_flags(arguments: Mapping[str, object]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in arguments.items())


def _pool(processes: int) -> Any:
    # fork: the children only paint, and start at once; spawn would import torch again in each of them.
    return multiprocessing.get_context("fork").Pool(processes) if processes > 1 else nullcontext()


def _draw(spec: DemoSpec, split: str, count: int, pool: Pool | None) -> Iterator[DemoSample]:
    """All samples of a split, in order."""
    spans = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    draw = partial(draw_samples, spec=spec, split=split)
    yield from chain.from_iterable(pool.imap(draw, spans) if pool else map(draw, spans))


def _write_all(root: Path, spec: DemoSpec, pool: Pool | None) -> None:
    train = _draw(spec, "train", spec.samples, pool)
    train = _write_csv(root / "csv", "train", train, limit=spec.csv_samples)
    _write_shards(root / "train", train, _split_evenly(spec.samples, spec.shards))
    val = _write_csv(root / "csv", "val", _draw(spec, "val", spec.val_samples, pool), limit=spec.val_samples)
    _write_shards(root / "val", val, _split_evenly(spec.val_samples, 2))

    zeroshot = _draw(spec, "zeroshot", spec.zeroshot_samples, pool)
    _write_evaluation_set(root / "zeroshot", zeroshot, _split_evenly(spec.zeroshot_samples, 2), kind="classification")
    _write_lines(root / "zeroshot" / "classnames.txt", CLASS_NAMES)
    _write_lines(root / "zeroshot" / "zeroshot_classification_templates.txt", TEMPLATES)

    retrieval = _draw(spec, "retrieval", spec.retrieval_samples, pool)
    _write_evaluation_set(root / "retrieval", retrieval, [spec.retrieval_samples], kind="retrieval")


def _split_evenly(count: int, parts: int) -> list[int]:
    return [count // parts + (part < count % parts) for part in range(parts)]


def _write_shards(directory: Path, samples: Iterator[DemoSample], counts: list[int]) -> None:
    """Tars `000.tar ...` with `counts` samples each, and sizes.json, which OpenCLIP and we read the lengths from."""
    _write_tars(directory, samples, counts, digits=3)
    sizes = {f"{shard:03d}.tar": count for shard, count in enumerate(counts)}
    (directory / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")


def _write_evaluation_set(root: Path, samples: Iterator[DemoSample], counts: list[int], *, kind: str) -> None:
    _write_tars(root / "test", samples, counts, digits=1)
    _write_lines(root / "test" / "nshards.txt", [str(len(counts))])
    _write_lines(root / "dataset_type.txt", [kind])


def _write_tars(directory: Path, samples: Iterator[DemoSample], counts: list[int], *, digits: int) -> None:
    directory.mkdir(parents=True)
    pattern = str(directory).replace("%", "%%") + f"/%0{digits}d.tar"
    # mtime is fixed, as a time of writing would make every set different.
    with webdataset.ShardWriter(pattern, maxcount=max(counts) + 1, mtime=0, verbose=0) as writer:
        for shard, count in enumerate(counts):
            if shard > 0:
                writer.next_stream()
            for sample in islice(samples, count):
                writer.write(_members(sample))


def _members(sample: DemoSample) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {"__key__": sample.key, "jpg": sample.jpeg}
    if sample.label is None:
        members["txt"] = "\n".join(sample.texts)
    else:
        members["cls"] = str(sample.label)
    return members


def _write_csv(directory: Path, split: str, samples: Iterator[DemoSample], *, limit: int) -> Iterator[DemoSample]:
    """Pass the samples on, and write the first `limit` of them as CSV rows and image files on the way.

    Paths are relative to the CSV file: the set can be moved, and is the same bytes wherever it was made.
    """
    images = directory / "images" / split
    images.mkdir(parents=True)
    with (directory / f"{split}.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("filepath", "title"))
        for sample in islice(samples, limit):
            path = images / f"{sample.key}.jpg"
            path.write_bytes(sample.jpeg)
            writer.writerow((path.relative_to(directory).as_posix(), sample.texts[0]))
            yield sample
    yield from samples


def _write_lines(path: Path, lines: tuple[str, ...] | list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_manifest(root: Path, spec: DemoSpec) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".jpg")
    manifest = {
        "format": FORMAT,
        "arguments": asdict(spec),
        "files": {path.relative_to(root).as_posix(): path.stat().st_size for path in files},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
