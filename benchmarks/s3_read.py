"""CPU seconds per GB and time to the first byte: our S3 reader against ``aws s3 cp`` on one local server, and files.

    python -m benchmarks.s3_read --aws PATH_TO_AWS

    server process (objects in memory) <- storage | pipe, and files <- cat | file, one fresh reader process per round,
    A B C D D C B A ... -> JSON

What counts is the processor time of the reader and everything it starts; the server's is its own. The pipe is
``pipe:aws s3 cp s3://... -`` read by the same tar-sized reads; ``pipe:cat FILE`` and the file itself, from the page
cache, show what a pipe and no network cost. Without ``--aws``, awscli is installed by pip into a
temporary environment.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import Any, cast

import torch

from benchmarks.provenance import ROOT, describe_run
from training.data.storage import Storage, StorageOptions

RESULTS = ROOT / "benchmarks" / "results"
ARMS = ("storage", "pipe", "cat", "file")
_READ_BYTES = 64 << 10
"""As large as a member of a shard."""
logger = logging.getLogger("benchmarks.s3_read")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.s3_read", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--aws", type=Path, help="the aws command (default: installed into a temporary environment)")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-mb", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="per arm")
    parser.add_argument("--out", type=Path, default=RESULTS / "s3_read_cpu.json")
    parser.add_argument("--read", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--urls", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole benchmark or, in a child process, one round of one arm."""
    arguments = parse_arguments(argv)
    if arguments.read:
        sys.stdout.write(json.dumps(read_shards(arguments.urls, native=arguments.read == "storage")) + "\n")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as directory:
        aws = arguments.aws or install_aws(Path(directory))
        result = measure(arguments, aws.absolute())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    logger.info("%s", table(result))
    return 0


def install_aws(directory: Path) -> Path:
    """The aws command in an environment of its own: its pinned dependencies must not touch ours."""
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    subprocess.run([directory / "venv" / "bin" / "pip", "install", "--quiet", "awscli"], check=True)
    return directory / "venv" / "bin" / "aws"


def measure(arguments: argparse.Namespace, aws: Path) -> dict[str, Any]:
    """Alternating rounds of both arms, each in a fresh process."""
    version = subprocess.run([aws, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with (
        serve(arguments.shards, arguments.shard_mb * 1_000_000) as (endpoint, keys),
        tempfile.TemporaryDirectory() as directory,
    ):
        copy = [f"pipe:{aws} s3 cp s3://bench/{key} -" for key in keys]
        files = save_files(directory, len(keys), arguments.shard_mb * 1_000_000)
        urls = {"storage": copy, "pipe": copy, "cat": [f"pipe:cat {file}" for file in files], "file": files}
        for number in range(arguments.rounds):
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                rounds[arm].append(run_round(arm, endpoint, urls[arm]))
                logger.info("round %d %s: %s", number, arm, rounds[arm][-1])
    run = describe_run(torch.device("cpu"))
    run["command"] = str(run["command"]).replace(str(arguments.aws), "aws")  # no place on this machine
    settings = {name: getattr(arguments, name) for name in ("shards", "shard_mb", "rounds")}
    return {
        "benchmark": "s3_read",
        "settings": settings | {"aws": version, "read_bytes": _READ_BYTES},
        "run": run,
        "arms": {arm: {name: spread([one[name] for one in runs]) for name in runs[0]} for arm, runs in rounds.items()},
        "rounds": rounds,
    }


def save_files(directory: str, shards: int, shard_bytes: int) -> list[str]:
    """The objects of the server as files."""
    files = [Path(directory) / f"{shard:03d}.tar" for shard in range(shards)]
    for shard, file in enumerate(files):
        file.write_bytes(Random(shard).randbytes(shard_bytes))
    return [str(file) for file in files]


def run_round(arm: str, endpoint: str, urls: Sequence[str]) -> dict[str, float]:
    """One round in a fresh process, which reports on itself and on what it started."""
    environment = os.environ | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.s3_read", "--read", arm, "--urls", *urls]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return cast(dict[str, float], json.loads(done.stdout))


def read_shards(urls: Sequence[str], *, native: bool) -> dict[str, float]:
    """Reads shards one after the other; imports are over when the clock starts."""
    storage = Storage(StorageOptions(s3_native=native))
    if native:
        import training.data.object_stream  # noqa: F401 - a worker imports it once, not once per shard
    first_byte_s = []
    num_bytes = 0
    cpu, start = _cpu_s(), time.perf_counter()
    for url in urls:
        opened = time.perf_counter()
        with storage.open(url) as stream:
            num_bytes += len(stream.read(1))
            first_byte_s.append(time.perf_counter() - opened)
            while data := stream.read(_READ_BYTES):
                num_bytes += len(data)
    wall, cpu = time.perf_counter() - start, _cpu_s() - cpu
    gigabytes = num_bytes / 1e9
    return {
        "cpu_s_per_gb": cpu / gigabytes,
        "mb_per_s": 1000 * gigabytes / wall,
        "first_byte_ms": 1000 * statistics.median(first_byte_s),
        "first_byte_of_process_ms": 1000 * first_byte_s[0],
    }


def _cpu_s() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def serve(shards: int, shard_bytes: int) -> Iterator[tuple[str, list[str]]]:
    """The tests' object server with random shards: (endpoint, keys)."""
    command = [sys.executable, "-m", "tests.s3.server"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        keys = [f"{shard:03d}.tar" for shard in range(shards)]
        for shard, key in enumerate(keys):
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("PUT", f"/bench/{key}", Random(shard).randbytes(shard_bytes))
            connection.getresponse().read()
            connection.close()
        yield f"http://127.0.0.1:{port}", keys
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    names = list(next(iter(result["arms"].values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for arm, spreads in result["arms"].items():
        cells = [f"{s['median']:.3g} ({s['min']:.3g}-{s['max']:.3g})" for s in (spreads[name] for name in names)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
