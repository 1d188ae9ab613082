"""What a start costs with 231,350 shards and 1,024 ranks of six workers: seconds, memory, requests to S3.

    python -m benchmarks.scale_startup

One rank's real loader and workers, with the historical command line, read from the tests' object server, which counts.
What one rank asks for is multiplied by the ranks; the rates of S3 are Amazon's.
"""

from __future__ import annotations

import http.client
import io
import json
import multiprocessing
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image

from benchmarks.process_meter import memory, process_tree
from benchmarks.scale_jobs import B_32_256, LOCAL_BATCHES, XXLARGE
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, seconds, table
from models.config import PreprocessConfig, load_model_config
from models.factory import build_model
from models.tokenizer import Tokenizer
from training.checkpoint.parts import choose_writers
from training.config import DataConfig, ImageConfig
from training.data.build import build_train_loader

NAME = "scale_startup"
WORLD = 1024
S3_GETS_PER_S = 5500
"""Of one prefix before S3 has split it. Published: Amazon's performance guidelines."""
_BUCKET, _PREFIX = "laion5b", "laion2B-data"
_SAMPLES = 600
"""In the tar that stands for every shard: 24 MB of the real 345; more than a lane reads here."""
_TURNS = 2
"""Slots of each lane that may be read."""
_CUDA_HOST_GB = 2.0
"""Host memory of a process that has a CUDA context, NCCL and page-locked buffers. Assumed."""
_NODE_GPUS = 8
_RING_SLOTS = 3
"""Batches in shared memory, as the loader has them."""
T = TypeVar("T")


def measure(*, small: bool = False) -> Result:
    """One rank's start, and what follows for a node and for the job."""
    shards, workers, batches = (1000, 2, 3) if small else (XXLARGE.num_shards, XXLARGE.workers, 110)
    world = 16 if small else WORLD
    rank = one_rank(shards=shards, workers=workers, world=world, batches=batches)
    return {
        "world": world,
        "shards": shards,
        "workers": workers,
        "rank": rank,
        "job": whole_job(rank, world=world),
        "nodes": [node_memory(rank, model) for model in (("demo-vit",) if small else LOCAL_BATCHES)],
    }


def one_rank(*, shards: int, workers: int, world: int, batches: int) -> dict[str, Any]:
    """In a process of its own, so that its memory and its children can be told from ours."""
    from tests.s3.client import Bucket, ObjectServer  # the tests' server: present in a checkout, not in a wheel

    server = ObjectServer()
    try:
        bucket = Bucket(server, _BUCKET)
        bucket.put("one.tar", _tar())
        ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
        arguments = (theirs, bucket.environment(), server.port, shards, workers, world, batches)
        process = multiprocessing.get_context("spawn").Process(target=_measure_rank, args=arguments)
        process.start()
        numbers = cast(dict[str, Any], ours.recv())
        process.join()
        return numbers
    finally:
        server.close()


def _measure_rank(
    report: Connection,
    environment: dict[str, str],
    port: int,
    shards: int,
    workers: int,
    world: int,
    batches: int,
) -> None:
    os.setsid()
    os.environ.update(environment)
    requests = _Requests(port)
    before = memory([os.getpid()])
    loader, build_s = _timed(lambda: _loader(shards, workers, world))
    after = memory([os.getpid()])
    for lane in loader.lanes:  # every shard that may be asked for is the one tar
        for turn in range(_TURNS):
            url = loader.source.shard_name(loader.deal.piece(lane, turn).slot)
            requests.alias(url.split(f"s3://{_BUCKET}/")[1].split(" ")[0])
    _, check_s = _timed(loader.check_first_sample)
    at_check = requests.count()
    stream = iter(loader)
    _, first_s = _timed(lambda: next(stream))
    at_first = requests.count()
    steady = time.perf_counter()
    for _ in range(batches):
        loader.commit(next(stream).record)
    steady = time.perf_counter() - steady
    at_end = requests.count()
    children = process_tree(os.getpid())[1:]
    report.send(
        {
            "build_s": build_s,
            "first_sample_s": check_s,
            "first_batch_s": first_s,
            "requests_first_sample": at_check[0],
            "requests_first_batch": at_first[0] - at_check[0],
            "bytes_first_batch": at_first[1],
            "batches": batches,
            "batch_size": loader.batch_size,
            "samples_per_s": batches * loader.batch_size / steady,
            "requests": at_end[0],
            "requests_that_failed": at_end[2],
            "bytes": at_end[1],
            "shards_opened": at_end[3],
            "names_mb": after.rss_mb - before.rss_mb,
            "trainer_rss_mb": memory([os.getpid()]).rss_mb,
            "loader_pss_mb": memory(children).pss_mb,
            "loader_processes": len(children),
            "pss_mb_per_worker": memory(children).pss_mb / workers,
            "lanes": loader.deal.num_lanes,
        }
    )


def _loader(shards: int, workers: int, world: int) -> Any:
    return build_train_loader(
        DataConfig(
            train_data=f"pipe:aws s3 cp s3://{_BUCKET}/{_PREFIX}/{{000000..{shards - 1:06d}}}.tar -",
            train_num_samples=XXLARGE.samples_per_epoch,
            dataset_type="webdataset",
            dataset_resampled=True,
            batch_size=XXLARGE.batch_size,
            workers=workers,
        ),
        ImageConfig(aug_cfg={"use_timm": True, "scale": (0.33, 1.0), "re_prob": 0.35}),
        preprocess=PreprocessConfig(size=(256, 256)),
        tokenizer=Tokenizer(load_model_config("ViT-B-32")),
        rank=world // 2,
        world_size=world,
        accum_freq=1,
        seed=0,
    )


class _Requests:
    """What the server was asked for."""

    def __init__(self, port: int) -> None:
        self._port = port

    def alias(self, key: str) -> None:
        """From its first request on the key has the one tar's content."""
        fault = {"times": 1, "replace_with": f"/{_BUCKET}/one.tar"}
        self._call("POST", "/__faults__", json.dumps({"path": f"/{_BUCKET}/{key}", "faults": [fault]}).encode())

    def count(self) -> tuple[int, int, int, int]:
        """(requests, bytes sent, requests refused, objects) so far, of shards."""
        log = [line for line in json.loads(self._call("GET", "/__log__")) if f"/{_PREFIX}/" in line[1]]
        paths = {line[1] for line in log}
        return len(log), sum(line[4] for line in log), sum(line[3] >= 400 for line in log), len(paths)

    def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request(method, path, body)
        data = connection.getresponse().read()
        connection.close()
        return data


def _tar() -> bytes:
    """Samples of the size that LAION's have."""
    random, buffer = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(random.integers(0, 256, (64, 80, 3), dtype=np.uint8)).resize((380, 300))
    picture = io.BytesIO()
    coarse.save(picture, "JPEG", quality=96)
    data = picture.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index in range(_SAMPLES):
            for extension, content in (("jpg", data), ("txt", b"a photograph of something"), ("json", b"{}" * 150)):
                info = tarfile.TarInfo(f"{index:09d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def whole_job(rank: dict[str, Any], *, world: int) -> dict[str, Any]:
    """Arithmetic: what one rank does, for all of them."""
    at_start = rank["requests_first_sample"] + rank["requests_first_batch"]
    per_gb = rank["requests"] / rank["bytes"] * 1e9
    jobs = {}
    for job in (XXLARGE, B_32_256):
        gb_s = job.samples_per_s * job.sample_kb / 1e6
        jobs[job.name] = {"gb_per_s": gb_s, "gbit_per_s": 8 * gb_s, "gets_per_s": gb_s * per_gb}
    return {
        "requests_at_start": at_start * world,
        "gb_at_start": rank["bytes_first_batch"] * world / 1e9,
        "s_at_the_limit_of_one_prefix": at_start * world / S3_GETS_PER_S,
        "requests_per_gb": per_gb,
        "loader_processes": rank["loader_processes"] * world,
        "running": jobs,
    }


def node_memory(rank: dict[str, Any], model: str) -> dict[str, Any]:
    """Host memory of a node of eight GPUs, running and while it starts."""
    config = load_model_config(model)
    parameters = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
    height, width = config.vision_cfg.image_hw
    measured = _RING_SLOTS * 3 * 256 * 256 * rank["batch_size"]
    ring = _RING_SLOTS * 3 * height * width * LOCAL_BATCHES.get(model, 8)
    loaders = rank["loader_pss_mb"] * 1e6 - measured + ring
    trainers = rank["trainer_rss_mb"] * 1e6 + _CUDA_HOST_GB * 1e9
    writers = choose_writers(12 * parameters, world_size=WORLD)
    on_one_node = max(Counter(writer // _NODE_GPUS for writer in writers).values())
    staging = on_one_node * 12 * parameters / len(writers)
    build = 4 * parameters  # fp32, on the CPU of every rank, before it goes to its device
    return {
        "model": model,
        "loaders_gb": _NODE_GPUS * loaders / 1e9,
        "trainers_gb": _NODE_GPUS * trainers / 1e9,
        "staging_gb": staging / 1e9,
        "building_gb": _NODE_GPUS * build / 1e9,
        "running_gb": (_NODE_GPUS * (loaders + trainers) + staging) / 1e9,
        "peak_at_start_gb": _NODE_GPUS * (trainers + build + rank["names_mb"] * 1e6) / 1e9,
    }


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def tables(result: Result) -> Tables:
    """Markdown by name."""
    rank, job = result["rank"], result["job"]
    world = f"{result['world']:,}"
    rows = [
        ["loader built from the pattern", seconds(rank["build_s"])],
        ["first sample read and decoded by the trainer", seconds(rank["first_sample_s"])],
        [f"{result['workers']} workers started, {rank['lanes']:,} lanes, first batch", seconds(rank["first_batch_s"])],
        ["requests until then", rank["requests_first_sample"] + rank["requests_first_batch"]],
        ["bytes until then", num_bytes(rank["bytes_first_batch"])],
        ["memory of all names, in the trainer", f"{rank['names_mb']:.0f} MB"],
        ["memory per worker, after a block of every lane (PSS)", f"{rank['pss_mb_per_worker']:.0f} MB"],
        ["trainer (RSS, without a device)", f"{rank['trainer_rss_mb']:.0f} MB"],
        ["requests per GB, all of it", f"{job['requests_per_gb']:.0f}"],
        ["requests that failed", rank["requests_that_failed"]],
    ]
    whole = [
        [f"requests until the first batch, {world} ranks", f"{job['requests_at_start']:,}"],
        [f"at S3's {S3_GETS_PER_S:,} a second for one prefix", seconds(job["s_at_the_limit_of_one_prefix"])],
        ["bytes until then", num_bytes(job["gb_at_start"] * 1e9)],
        *(
            [
                f"running, {name}",
                f"{run['gb_per_s']:.1f} GB/s, {run['gbit_per_s']:.0f} Gbit/s, {run['gets_per_s']:.0f} requests/s",
            ]
            for name, run in job["running"].items()
        ),
    ]
    nodes = [
        [
            node["model"],
            *(f"{node[key]:.1f}" for key in ("trainers_gb", "loaders_gb", "staging_gb", "running_gb", "building_gb")),
            f"{node['peak_at_start_gb']:.1f}",
        ]
        for node in result["nodes"]
    ]
    header = ["model", "8 trainers", "48 workers", "checkpoint copy", "**running**", "8 models on the CPU"]
    return {
        "startup_rank": table(["one rank", "measured"], rows),
        "startup_job": table(["the whole job", ""], whole),
        "node_memory": table([*header, "**peak at the start**, GB"], nodes),
    }


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
