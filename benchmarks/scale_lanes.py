"""1,024 -> 512 -> 320 -> 1,088 ranks on the loaders themselves: is every sample of an epoch seen, and just once?

    python -m benchmarks.scale_lanes

Every rank of every leg is a real ``TrainLoader``, with real lane readers over 231,350 shards; only tar files and
pictures are missing (a shard holds a few numbered samples). Between two legs the position goes through the tensors
and the JSON of a checkpoint. The last leg deals the unread data anew, to as many lanes as suit its ranks.

A second part compares global batches: with lanes and a batch that all worlds divide, they must be equal as sets.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.scale_jobs import LAION_SHARDS, LEGS
from benchmarks.scale_report import Result, Tables, run_benchmark, seconds, table
from training.data.decode import Sample
from training.data.epoch import choose_block, choose_lanes
from training.data.lanes import Deal, owned_lanes, shard_of_slot
from training.data.loader import TrainLoader
from training.data.position import RankPosition, StreamIdentity, StreamPosition, read_position
from training.data.sources import NO_COUNTERS
from training.data.tar_reader import RawSample

NAME = "scale_lanes"
SEED = 7
_NO_MEMBERS: dict[str, bytes] = {}
_BLOCK = 3
"""Samples: as a shard of a few samples suits. A real one of 8,600 is read in blocks of 85."""
_PIXEL = torch.zeros(3, 1, 1, dtype=torch.uint8)
Indices = npt.NDArray[np.int64]


class NumberedShards:
    """Shards of different sizes without bytes, in epoch mode."""

    source_names = ("numbered",)
    parts = 1
    counters = NO_COUNTERS

    def __init__(self, num_shards: int, *, mean_samples: int) -> None:
        random = np.random.default_rng(SEED)
        # Real shards of one data set differ by a few per cent; these by a quarter.
        self.sizes = random.integers(3 * mean_samples // 4, 5 * mean_samples // 4 + 1, num_shards)
        self.slots_per_epoch = num_shards

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        """From a sample on; the byte where it begins must be the one that the lane remembered."""
        assert offset in (0, 512 * start)
        size = int(self.sizes[shard_of_slot(slot, num_shards=self.slots_per_epoch, seed=SEED)])
        for index in range(start, size):
            yield RawSample("", _NO_MEMBERS, 512 * index)

    def shard_name(self, slot: int) -> str:
        """For messages."""
        return f"slot {slot}"

    def source_of(self, slot: int) -> int:
        """There is only one."""
        return 0

    def slot_sizes(self, epoch: int) -> Indices:
        """Samples of each slot of an epoch, in order."""
        slots = range(epoch * self.slots_per_epoch, (epoch + 1) * self.slots_per_epoch)
        shards = [shard_of_slot(slot, num_shards=self.slots_per_epoch, seed=SEED) for slot in slots]
        return np.asarray(self.sizes[shards], dtype=np.int64)


class OnePixel:
    """Decodes to nothing: identities are what is looked at."""

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        """Always usable."""
        return Sample("", _PIXEL, "")


def no_tokens(texts: Sequence[str], /) -> Tensor:
    """int64 [n, 1]"""
    return torch.zeros(len(texts), 1, dtype=torch.int64)


class Ledger:
    """How often each sample of the first epochs was seen."""

    EPOCHS = 3

    def __init__(self, source: NumberedShards) -> None:
        sizes = np.concatenate([source.slot_sizes(epoch) for epoch in range(self.EPOCHS)])
        self._sizes = sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self.epoch_samples = int(self._first[source.slots_per_epoch])
        self.seen = np.zeros(self._first[-1], dtype=np.uint8)

    def add(self, samples: Indices) -> None:
        """[n, 3]: slot, index, source."""
        slots, indices = samples[:, 0], samples[:, 1]
        assert (indices < self._sizes[slots]).all()
        np.add.at(self.seen, self._first[slots] + indices, 1)


class Job:
    """One job whose position lives between its legs."""

    def __init__(self, source: NumberedShards, *, lanes: int, block: int) -> None:
        self.source = source
        self.deal = Deal(lanes, block, SEED)
        self.position: StreamPosition | None = None

    def loader(self, rank: int, world: int, batch: int, *, lanes: int = 0, block: int = 0) -> TrainLoader:
        """Of one rank, where the job stands; ``lanes`` and ``block`` as asked for by flags."""
        loader = TrainLoader(
            self.source,
            identity=StreamIdentity(SEED, False, "numbered"),
            deal=self.deal,
            rank=rank,
            world_size=world,
            batch_size=batch,
            image_size=(1, 1),
            decoder=OnePixel(),
            tokenizer=no_tokens,
            num_workers=0,
            num_batches=1,
            num_samples=int(self.source.sizes.sum()),
            requested_lanes=lanes,
            requested_block=block,
        )
        if self.position is not None:
            loader.load_position(self.position)
        return loader

    def run(self, world: int, batch: int, steps: int) -> Iterator[tuple[int, Indices]]:
        """(step, samples [B, 3]) of every rank, rank after rank; then the job stands after these steps."""
        places: list[RankPosition] = []
        for rank in range(world):
            loader = self.loader(rank, world, batch)
            for step, loaded in enumerate(islice(iter(loader), steps)):
                loader.commit(loaded.record)
                yield step, loaded.record.samples.numpy()
            places.append(loader.position())
        merged = loader.merge(places)
        # As a checkpoint does: through tensors and JSON.
        self.position = read_position(merged.tensors(), json.loads(json.dumps(merged.facts())))

    def deal_anew(self, lanes: int, block: int, *, world: int) -> bool:
        """What every loader does when asked for other lanes, once for all of them (1,088 loaders would each take the
        same second); returns whether a loader of the new world comes to the same by itself."""
        saved = self.position
        assert saved is not None
        alone = self.loader(world - 1, world, 1, lanes=lanes, block=block)
        deal = saved.deal.again(list(saved.lanes), num_lanes=lanes, block=block)
        starts = [deal.start(lane, 0) for lane in range(lanes)]
        self.position = StreamPosition(saved.identity, deal, starts, 0, [0] * world)
        ours = self.loader(world - 1, world, 1)
        return ours.position() == alone.position() and np.array_equal(deal.pieces, alone.deal.pieces)

    def slowest_slot(self) -> int:
        """The earliest slot that a lane is in."""
        assert self.position is not None
        deal = self.position.deal
        return min(deal.piece(lane, place.turn).slot for lane, place in enumerate(self.position.lanes))


def measure(*, small: bool = False) -> Result:
    """Both parts."""
    scale = 64 if small else 1
    return {
        "accounting": account(shards=LAION_SHARDS // scale, mean_samples=8, scale=scale),
        "equal_batches": [compare(lanes, shards=LAION_SHARDS // scale, scale=scale) for lanes in (17_408, 87_040)],
    }


def account(*, shards: int, mean_samples: int, scale: int) -> dict[str, Any]:
    """The historical legs, in shares of the epoch; then on until every lane has left it."""
    source = NumberedShards(shards, mean_samples=mean_samples)
    ledger = Ledger(source)
    first_world = LEGS[0][0] // scale
    job = Job(source, lanes=choose_lanes(shards, world_size=first_world), block=_BLOCK)
    legs, anew_equal, total = [], False, 0
    for number, (gpus, batch) in enumerate(LEGS):
        world, last = gpus // scale, number == len(LEGS) - 1
        if last:
            lanes = choose_lanes(shards, world_size=world)
            anew_equal = job.deal_anew(lanes, _BLOCK, world=world)
        start, steps = time.perf_counter(), 0
        chunk = max(1, ledger.epoch_samples // (5 * world * batch))
        while steps == 0 or (last and job.slowest_slot() < shards):
            for _, samples in job.run(world, batch, chunk):
                ledger.add(samples)
            steps += chunk
            chunk = 2 if last else chunk
        total += steps * world * batch
        assert job.position is not None
        deal = job.position.deal
        owned = [len(owned_lanes(deal.num_lanes, rank=rank, world_size=world)) for rank in (0, world - 1)]
        legs.append(
            {
                "ranks": world,
                "batch_size": batch,
                "steps": steps,
                "samples": steps * world * batch,
                "lanes": deal.num_lanes,
                "lanes_per_rank": sorted(set(owned)),
                "pieces": len(deal.pieces),
                "seconds": time.perf_counter() - start,
            }
        )
    epoch, after = ledger.seen[: ledger.epoch_samples], ledger.seen[ledger.epoch_samples :]
    return {
        "shards": shards,
        "samples": ledger.epoch_samples,
        "legs": legs,
        "block_of_real_shards": choose_block(choose_lanes(shards, world_size=first_world), world_size=first_world),
        "seen_once": int((epoch == 1).sum()),
        "seen_never": int((epoch == 0).sum()),
        "seen_more_often": int((epoch > 1).sum()),
        "next_epochs_seen_once": int((after == 1).sum()),
        "next_epochs_seen_more_often": int((after > 1).sum()),
        "consumed": total,
        "counted": int(ledger.seen.sum()),
        "loader_deals_anew_equally": anew_equal,
    }


def compare(lanes: int, *, shards: int, scale: int) -> dict[str, Any]:
    """Digests of the first global batches as sets, by world; a step of ``lanes`` samples (scaled)."""
    source = NumberedShards(shards, mean_samples=8)
    lanes //= scale
    digests: dict[str, list[str]] = {}
    for gpus, _ in LEGS:
        world = gpus // scale
        if lanes % world:
            continue
        steps: dict[int, list[Indices]] = {}
        for step, samples in Job(source, lanes=lanes, block=_BLOCK).run(world, lanes // world, 2):
            steps.setdefault(step, []).append(samples)
        digests[str(gpus)] = [_digest(np.concatenate(parts)) for parts in steps.values()]
    return {"lanes": lanes, "global_batch": lanes, "worlds": digests}


def _digest(samples: Indices) -> str:
    """Of a set of samples, whatever their order."""
    ordered = samples[np.lexsort((samples[:, 1], samples[:, 0]))]
    return hashlib.sha256(np.ascontiguousarray(ordered).tobytes()).hexdigest()[:16]


def tables(result: Result) -> Tables:
    """Markdown by name."""
    found = result["accounting"]
    rows = [
        [
            f"{leg['ranks']:,} x {leg['batch_size']}",
            leg["steps"],
            f"{leg['samples']:,}",
            f"{leg['lanes']:,}" + (f", dealt anew from {leg['pieces']:,} begun or waiting slots" * bool(leg["pieces"])),
            " or ".join(map(str, leg["lanes_per_rank"])),
            seconds(leg["seconds"]),
        ]
        for leg in found["legs"]
    ]
    verdict = [
        ["samples of the epoch", f"{found['samples']:,}"],
        ["seen just once", f"{found['seen_once']:,}"],
        ["never seen", found["seen_never"]],
        ["seen more than once", found["seen_more_often"]],
        ["of later epochs, begun by lanes that were faster: once", f"{found['next_epochs_seen_once']:,}"],
        ["of later epochs: more than once", found["next_epochs_seen_more_often"]],
        ["consumed by all steps, counted here", f"{found['consumed']:,}, {found['counted']:,}"],
    ]
    equal = [
        [f"{part['lanes']:,}", ", ".join(part["worlds"]), "yes" if _all_equal(part["worlds"]) else "NO"]
        for part in result["equal_batches"]
    ]
    return {
        "legs": table(["ranks x batch", "steps", "samples", "lanes", "lanes per rank", "simulated in"], rows),
        "accounting": table(["", "samples"], verdict),
        "equal_batches": table(["lanes = global batch", "ranks that divide it", "the same global batches"], equal),
    }


def _all_equal(worlds: dict[str, list[str]]) -> bool:
    return len({tuple(digests) for digests in worlds.values()}) == 1


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
