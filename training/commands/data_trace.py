"""``clipyard data trace RUN --step N``: which samples a step consumed, by rank, shard and key.

Read from what ``--trace-samples`` wrote, else found by reading the data again from the newest checkpoint before the
step (which decodes every sample in between, to know which of them could be used).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from models.config import PreprocessConfig, as_pair, load_model_config
from models.tokenizer import Tokenizer
from training.checkpoint.checkpointer import Checkpointer, read_step_checkpoint
from training.cli import load_config
from training.config import Config
from training.data.build import build_train_loader
from training.data.lane_reader import Source
from training.data.loader import TrainLoader
from training.data.position import StreamPosition, read_position
from training.data.storage import StorageError
from training.data.trace import TRACE_DIRECTORY, read_trace
from training.naming import EVENTS_FILE, STARTS_FILE
from training.observability.events import read_events
from training.observability.history import read_starts


class Start(NamedTuple):
    """One start of a run, as it wrote it down: what the samples of the steps after it depend on."""

    step: int
    world_size: int
    batch_size: int
    accum_freq: int
    data_lanes: int
    shuffle_block: int


class TracedSample(NamedTuple):
    """One row of a step."""

    rank: int
    slot: int
    raw_index: int
    shard: str
    key: str


def main(argv: Sequence[str]) -> int:
    """Prints one line per sample: rank, shard, key; exit code 2 if the step cannot be traced."""
    parser = argparse.ArgumentParser(prog="clipyard data trace", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's directory: --logs joined with --name")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 0 as in the logs")
    parser.add_argument("--rank", type=int, help="only the samples of this rank")
    arguments = parser.parse_args(argv)
    try:
        samples = trace_step(arguments.run, arguments.step, rank=arguments.rank)
    except (ValueError, OSError, StorageError) as error:
        sys.stderr.write(f"clipyard data trace: {error}\n")
        return 2
    for sample in samples:
        sys.stdout.write(f"{sample.rank}\t{sample.shard}\t{sample.key}\n")
    return 0


def trace_step(run: Path, step: int, *, rank: int | None = None) -> list[TracedSample]:
    """The samples of a step, in rank order and in the order of each rank's rows; of one rank or of all.

    Raises:
        ValueError: the run has not come to this step, or what is left of it does not tell.
    """
    start = _start_before(run, step)
    config = load_config(run / "config.yaml")
    ranks = range(start.world_size) if rank is None else range(rank, rank + 1)
    if ranks[-1] >= start.world_size:
        raise ValueError(f"--rank {rank}: step {step} was taken by {start.world_size} ranks, counted from 0.")
    loader = _loader(config, start, rank=0)
    records = read_trace(run / TRACE_DIRECTORY, step=step)
    if records:
        places = [
            (owner, int(record["slot"]), int(record["raw_index"]))
            for owner in ranks
            for record in records.get(owner, ())
        ]
    else:
        places = _replay(run, config, start, step, ranks=ranks)
    return _with_keys(places, loader.source)


def _start_before(run: Path, step: int) -> Start:
    path = run / STARTS_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: {str(run)!r} is no run of this program. Pass --logs joined with --name."
        )
    lines = read_starts(path)
    before = [line for line in lines if line["step"] <= step]
    if not before:
        raise ValueError(f"The run begins at step {lines[0]['step']}, after --step {step}.")
    changed = [line["step"] for line in lines[lines.index(before[-1]) + 1 :] if line.get("new_data")]
    if changed:
        raise ValueError(
            f"Other data was given from step {changed[0]} on: what was read before cannot be told any more."
        )
    start = Start(**{name: before[-1][name] for name in Start._fields})
    # A phase with another batch size begins at its own checkpoint, within a start.
    for event in read_events(run / EVENTS_FILE):
        if event.get("event") == "phase" and start.step < event["step"] <= step:
            start = start._replace(step=event["step"], batch_size=event["batch_size"])
    return start


def _loader(config: Config, start: Start, *, rank: int) -> TrainLoader:
    data = replace(
        config.data,
        batch_size=start.batch_size,
        data_lanes=start.data_lanes,
        shuffle_block=start.shuffle_block,
        workers=0,
    )
    size = config.model.force_image_size or load_model_config(config.model.model).vision_cfg.image_size
    return build_train_loader(
        data,
        config.image,
        preprocess=PreprocessConfig(size=as_pair(size[0] if isinstance(size, tuple) and len(size) == 1 else size)),
        tokenizer=cast(Tokenizer, _no_tokens),
        rank=rank,
        world_size=start.world_size,
        accum_freq=start.accum_freq,
        seed=config.engine.seed,
    )


def _no_tokens(texts: Sequence[str]) -> Tensor:
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def _replay(run: Path, config: Config, start: Start, step: int, *, ranks: range) -> list[tuple[int, int, int]]:
    first, position = _position_before(run, start, step)
    places = []
    for rank in ranks:
        loader = _loader(config, start, rank=rank)
        if position is not None:
            loader.load_position(position)
        before = (step - first) * start.accum_freq
        for batch in islice(loader, before, before + start.accum_freq):
            places += [(rank, slot, raw_index) for slot, raw_index, _ in batch.record.samples.tolist()]
    return places


def _position_before(run: Path, start: Start, step: int) -> tuple[int, StreamPosition | None]:
    """(step, position) of the newest checkpoint that is not after ``step``; (0, None) where the run began."""
    checkpointer = Checkpointer(run / "checkpoints")
    steps = [saved for saved in checkpointer.steps() if start.step <= saved <= step]
    if steps:
        checkpoint = read_step_checkpoint(checkpointer.root / f"step_{steps[-1]:08d}")
        return steps[-1], read_position(checkpoint.data, checkpoint.train["data"])
    if start.step == 0:
        return 0, None
    raise ValueError(
        f"No checkpoint between the start at step {start.step} and --step {step} is left (there are: "
        f"{checkpointer.steps()}): steps after the oldest can be traced; --trace-samples keeps all of them."
    )


def _with_keys(places: Sequence[tuple[int, int, int]], source: Source) -> list[TracedSample]:
    """Reads the keys out of the shards, each shard once."""
    last: dict[int, int] = {}
    for _, slot, raw_index in places:
        last[slot] = max(raw_index, last.get(slot, 0))
    keys = {
        slot: [raw.key for raw in islice(source.read_slot(slot, start=0, offset=0), raw_index + 1)]
        for slot, raw_index in last.items()
    }
    if any(len(keys[slot]) <= raw_index for slot, raw_index in last.items()):
        raise ValueError("A shard holds fewer samples now than when it was trained on: its keys cannot be told.")
    return [
        TracedSample(rank, slot, raw_index, source.shard_name(slot), keys[slot][raw_index])
        for rank, slot, raw_index in places
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
