"""``clipyard data bench URL``: how fast this machine loads and decodes shards, and where the time goes.

Loads as training does, workers and all, and drops the batches; with ``--decode gpu`` the JPEGs are decoded on
``--device`` too (here, ``cpu`` where there is no GPU). Compare samples/s with what the model takes: loading is
no limit while it is faster. Other flags of training (``--aug-cfg``, ``--json-text-key``, ...) are taken as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from models.config import PreprocessConfig, as_pair, load_model_config
from models.tokenizer import build_tokenizer
from training.cli import parse_args
from training.config import Config
from training.data.batch import BatchRecord, to_device
from training.data.build import build_train_loader
from training.data.device_decode import check_decoder
from training.data.loader import TrainLoader
from training.data.prefetch import load_to_device, pin

_STAGES = ("read", "decode", "tokenize")
_ENDLESS = 1 << 40  # samples per epoch
_READY_BATCHES = 6
"""More than the ring holds."""


class Measured(NamedTuple):
    """What was loaded in the time."""

    samples: int
    seconds: float
    counts: Counter[str]


def build_parser() -> argparse.ArgumentParser:
    """The command's own options; all others are training's."""
    parser = argparse.ArgumentParser(prog="clipyard data bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("url", metavar="URL", help="as for --train-data")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="how long to measure, after warming up (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="loader processes; 0: this process (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--model", default="ViT-B-32", help="whose image size and tokenizer (%(default)s)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure and print; 1 if there is nothing to load."""
    arguments, training_flags = build_parser().parse_known_args(argv)
    try:
        config = parse_args(_flags(arguments, training_flags))
        device = _decoding_device(config)
        if device is not None:
            check_decoder(device)
        loader = _build_loader(config, device)
        loader.check_first_sample()
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"clipyard data bench: {error}\n")
        return 1
    measured = measure(_records(loader, device), batch_size=loader.batch_size, seconds=arguments.seconds)
    sys.stdout.write("\n".join(report(measured, workers=config.data.workers)) + "\n")
    return 0


def _flags(arguments: argparse.Namespace, training_flags: Sequence[str]) -> list[str]:
    """A training run's command line. Its epoch has no end: the command stops by the clock."""
    return [
        *("--train-data", arguments.url, "--train-num-samples", str(_ENDLESS), "--model", arguments.model),
        *("--workers", str(arguments.workers), "--batch-size", str(arguments.batch_size)),
        *training_flags,
    ]


def _build_loader(config: Config, device: torch.device | None) -> TrainLoader:
    model = load_model_config(config.model.model)
    size = config.model.force_image_size or model.vision_cfg.image_size
    return build_train_loader(
        config.data,
        config.image,
        preprocess=PreprocessConfig(size=as_pair(size[0] if isinstance(size, tuple) and len(size) == 1 else size)),
        tokenizer=build_tokenizer(model),
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=config.engine.seed,
        pin=pin if device is not None and device.type == "cuda" else None,
    )


def _decoding_device(config: Config) -> torch.device | None:
    """Where JPEGs are decoded that the workers do not decode."""
    if config.data.decode != "gpu":
        return None
    return torch.device(config.engine.device if torch.cuda.is_available() else "cpu")


def _records(loader: TrainLoader, device: torch.device | None) -> Iterator[BatchRecord]:
    """What was loaded, batch by batch, and decoded and normalised if that is the device's part."""
    if device is None:
        yield from (batch.record for batch in loader)
        return
    convert = partial(to_device, mean=(0.5,) * 3, std=(0.25,) * 3, device=device, dtype=torch.bfloat16)
    for batch in load_to_device(iter(loader), to_device=convert, device=device):
        assert batch.record is not None
        yield batch.record


def measure(records: Iterator[BatchRecord], *, batch_size: int, seconds: float) -> Measured:
    """Loads for a while; the clock starts once the batches that were loaded while the workers started are taken."""
    for _ in range(_READY_BATCHES):
        next(records)
    counts: Counter[str] = Counter()
    taken = 0
    start = time.perf_counter()
    while taken == 0 or time.perf_counter() - start < seconds:
        counts += next(records).counts
        taken += 1
    return Measured(taken * batch_size, time.perf_counter() - start, counts)


def report(measured: Measured, *, workers: int) -> Iterator[str]:
    """The lines of the report."""
    samples, seconds, counts = measured
    processes = max(1, workers)
    rate = samples / seconds
    yield f"{rate:,.0f} samples/s, {rate / processes:,.0f} per worker ({samples:,} samples in {seconds:.1f} s)"
    busy_us = sum(counts[f"{stage}_us"] for stage in _STAGES)
    for stage in _STAGES:
        spent_us = counts[f"{stage}_us"]
        yield f"  {stage:<9}{spent_us / samples:>8,.0f} us per sample{spent_us / max(busy_us, 1):>7.0%}"
    waiting = max(0.0, 1 - busy_us / 1e6 / seconds / processes)
    yield f"  waiting for this process, or for a processor: {waiting:.0%} of the workers' time"
    if counts["device_decode_us"]:
        on_host = sum(n for name, n in counts.items() if name.startswith("decoded_on_host/"))
        spent_us = counts["device_decode_us"]
        yield f"decoding on the device: {spent_us / samples:,.0f} us per sample; on the host: {on_host / samples:.1%}"
    megabytes = counts["bytes_read"] / 1e6
    yield f"read {megabytes / seconds:,.1f} MB/s, {1e3 * megabytes / samples:,.1f} kB per sample"
    skipped = {name.removeprefix("skipped/"): n for name, n in counts.items() if name.startswith("skipped/")}
    reasons = ", ".join(f"{name} {n:,}" for name, n in skipped.items()) or "none"
    yield f"skipped: {reasons}" + (f" ({sum(skipped.values()) / counts['read']:.2%})" if skipped else "")
    if counts["retries"]:
        yield f"retries: {counts['retries']:,}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
