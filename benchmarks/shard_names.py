"""What very many shard names cost at the start of a run: seconds, and memory of every loader worker.

    python -m benchmarks.shard_names [--shards 231350] [--workers 6]

All names lead to one small tar (``pipe:cat FILE #NAME``), so that nothing but the names differs between the two runs
that are compared: with ten names, and with all of them.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from benchmarks.process_meter import memory, process_tree
from benchmarks.provenance import ROOT, describe_run
from models.config import PreprocessConfig, load_model_config
from models.tokenizer import Tokenizer
from training.config import DataConfig, ImageConfig
from training.data.build import build_train_loader

RESULT = ROOT / "benchmarks" / "results" / "shard_names.json"
Numbers = dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both, prints and writes the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=231_350)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        tar = _write_tar(Path(directory) / "one.tar")
        few, many = (_in_own_process(tar, count, arguments.workers) for count in (10, arguments.shards))
    per_worker = (many["loader_pss_mb"] - few["loader_pss_mb"]) / arguments.workers
    result = {
        "run": describe_run(torch.device("cpu")),
        "workers": arguments.workers,
        "shards": arguments.shards,
        "ten": few,
        "all": many,
        "pss_mb_per_worker_for_the_names": round(per_worker, 1),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "run"}, indent=1) + "\n")


def _write_tar(path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 60)).save(buffer, "JPEG")
    with tarfile.open(path, "w") as archive:
        for index in range(64):
            for extension, data in (("jpg", buffer.getvalue()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{index}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def _in_own_process(tar: Path, shards: int, workers: int) -> Numbers:
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(theirs, str(tar), shards, workers))
    process.start()
    numbers = cast(Numbers, ours.recv())
    process.join()
    return numbers


def _measure(report: Connection, tar: str, shards: int, workers: int) -> None:
    os.setsid()
    start = time.perf_counter()
    loader = build_train_loader(
        DataConfig(
            train_data=f"pipe:cat {tar} #{{000000..{shards - 1:06d}}}",
            train_num_samples=100_000_000,
            dataset_resampled=True,
            dataset_type="webdataset",
            batch_size=64,
            workers=workers,
            data_lanes=48,
        ),
        ImageConfig(),
        preprocess=PreprocessConfig(size=(32, 32)),
        tokenizer=Tokenizer(load_model_config("ViT-B-32")),
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=0,
    )
    built = time.perf_counter()
    next(iter_ := iter(loader))
    first = time.perf_counter()
    children = process_tree(os.getpid())[1:]
    report.send(
        {
            "build_s": round(built - start, 3),
            "first_batch_s": round(first - built, 3),
            "loader_pss_mb": memory(children).pss_mb,
            "trainer_rss_mb": memory([os.getpid()]).rss_mb,
        }
    )
    del iter_


if __name__ == "__main__":
    main()
