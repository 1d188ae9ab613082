"""Shows that a run loses and repeats nothing: killed at random, moved to other numbers of processes, fed from S3.

    python -m tests.end_to_end.kill_and_resize --kills 10 --seed 1

1. Two processes with two workers each, data on a local S3 server: once undisturbed, once killed with signal 9 at random
   moments. Sample traces must be equal step by step and rank by rank, weights and losses bit for bit.
2. The same data on 4, then 2, 3 and 1 processes: every sample of the epoch must come exactly once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from tests.end_to_end.conftest import TINY_MODEL, start_ranks
from tests.factories import write_shards
from tests.faults.nursery_client import Rank
from tests.s3.client import Bucket, ObjectServer
from training.checkpoint.checkpointer import Checkpointer
from training.data.trace import read_trace

SHARDS, SAMPLES = 12, 36
SLOTS, SLOT_SAMPLES = SHARDS * 4, SAMPLES // 4
"""Few shards are read in four parts each."""
_RUN_S = 300.0


class Disagreement(AssertionError):
    """The killed run is not the undisturbed one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both shows; exit code 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--skip-resize", action="store_true", help="only the first show")
    arguments = parser.parse_args(argv)
    environment = dict(os.environ)
    server = ObjectServer()
    try:
        with tempfile.TemporaryDirectory() as directory:
            line = _prepare(Path(directory), server)
            show_kills(line, Path(directory), kills=arguments.kills, seed=arguments.seed)
            if not arguments.skip_resize:
                show_resize(line, Path(directory))
    except Disagreement as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        server.close()
        os.environ.clear()
        os.environ.update(environment)
    return 0


def _prepare(directory: Path, server: ObjectServer) -> list[str]:
    """Shards on the server, and the command line of all runs but for their names."""
    write_shards(directory / "shards", shards=SHARDS, samples=SAMPLES)
    bucket = Bucket(server, "show")
    bucket.upload_directory(directory / "shards")
    os.environ.update(bucket.environment())
    (directory / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = (
        "--device cpu --precision fp32 --batch-size 4 --workers 2 --warmup 2 --lr 1e-3 --force-patch-dropout 0.5 "
        "--aug-cfg scale=(0.4,1.0) color_jitter=(0.3,0.3,0.3,0.1) color_jitter_prob=0.8 --log-every-n-steps 1 "
        "--log-metric-every-n-steps 1 --save-every-n-steps 3 --resume latest --trace-samples --local-loss "
        "--gather-with-grad"
    )
    data = f"pipe:aws s3 cp s3://show/{{000..{SHARDS - 1:03d}}}.tar -"
    return [
        *flags.split(),
        *("--train-data", data, "--train-num-samples", str(SHARDS * SAMPLES)),
        *("--model", str(directory / "tiny.json"), "--logs", str(directory / "logs")),
    ]


def show_kills(line: Sequence[str], directory: Path, *, kills: int, seed: int) -> None:
    """The first show."""
    moments = random.Random(seed)
    whole, killed = directory / "logs/whole", directory / "logs/killed"
    _run_to_end([*line, "--name", "whole", "--epochs", "2"], world_size=2)
    print(f"undisturbed: {_last_step(whole) + 1} steps on 2 processes, 2 workers each, data from S3", flush=True)
    for kill in range(1, kills + 1):
        first, last = _kill_at_random([*line, "--name", "killed", "--epochs", "2"], killed, moments)
        print(f"kill {kill:2d}: started at step {first}, killed after step {last}", flush=True)
    _run_to_end([*line, "--name", "killed", "--epochs", "2"], world_size=2)
    _compare(whole, killed)
    print(f"sample trace of {len(read_trace(whole / 'trace')[0])} samples on each rank: equal")
    print(f"losses of {_last_step(whole) + 1} steps: equal; sha256 of the weights: {_weights(whole)[:16]} on both")


def _kill_at_random(line: Sequence[str], run: Path, moments: random.Random) -> tuple[int, int]:
    """Starts the run and kills all of it a few steps later; (step it started at, last step on record)."""
    log = run / "metrics.jsonl"
    inode = log.stat().st_ino if log.exists() else None
    steps = Checkpointer(run / "checkpoints").steps()
    first = steps[-1] if steps else 0
    wanted, extra_s = first + moments.randint(0, 12), moments.uniform(0, 0.3)
    processes = start_ranks(line, world_size=2)
    end = time.monotonic() + _RUN_S
    try:
        while time.monotonic() < end:
            if any(process.poll() is not None for process in processes):
                raise Disagreement(f"a run ended before it could be killed: {processes[0].communicate()[0][-2000:]}")
            # A started run first replaces its log by one without the steps that it is about to take again.
            if log.exists() and log.stat().st_ino != inode and _last_step(run) >= wanted:
                time.sleep(extra_s)
                return first, _last_step(run)
            time.sleep(0.01)
        raise Disagreement(f"no step {wanted} within {_RUN_S:.0f} s")
    finally:
        _kill(processes)


def _kill(processes: Sequence[Rank]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def _run_to_end(line: Sequence[str], *, world_size: int) -> None:
    processes = start_ranks(line, world_size=world_size)
    texts = [process.communicate(timeout=_RUN_S)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise Disagreement(f"a run ended with codes {codes}: {texts[0][-3000:]}")


def _compare(whole: Path, killed: Path) -> None:
    expected, found = read_trace(whole / "trace"), read_trace(killed / "trace")
    for rank, records in expected.items():
        if records.tolist() != found[rank].tolist():
            raise Disagreement(f"the samples of rank {rank} differ")
    if _losses(whole) != _losses(killed):
        raise Disagreement("the losses differ")
    if _weights(whole) != _weights(killed):
        raise Disagreement("the weights differ")


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in _metrics(run) if "train/loss" in line}


def _last_step(run: Path) -> int:
    return max(_losses(run), default=-1)


def _metrics(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    whole_lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole_lines if line.startswith("{") and line.endswith("}")]


def _weights(run: Path) -> str:
    newest = Checkpointer(run / "checkpoints").newest()
    assert newest is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(newest / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def show_resize(line: Sequence[str], directory: Path) -> None:
    """The second show: legs of a quarter of the data each, then one that reads all the rest."""
    quarter = ["--name", "moved", "--train-num-samples", str(SHARDS * SAMPLES // 4), "--allow-config-change", "epochs"]
    for epochs, world_size in ((1, 4), (2, 2), (3, 3), (6, 1)):
        _run_to_end([*line, *quarter, "--epochs", str(epochs)], world_size=world_size)
        print(f"on {world_size} processes up to step {_last_step(directory / 'logs/moved')}", flush=True)
    traces = read_trace(directory / "logs/moved/trace")
    seen = Counter((int(r["slot"]), int(r["raw_index"])) for records in traces.values() for r in records)
    epoch = {(slot, index) for slot in range(SLOTS) for index in range(SLOT_SAMPLES)}
    missing = epoch - set(seen)
    if missing or max(seen.values()) != 1:
        raise Disagreement(f"{len(missing)} samples are missing, {sum(n > 1 for n in seen.values())} came twice")
    print(f"4 -> 2 -> 3 -> 1 processes: each of the epoch's {len(epoch)} samples came exactly once")


if __name__ == "__main__":
    sys.exit(main())
