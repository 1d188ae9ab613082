"""A whole job's data stream in one process: real loaders of every rank over a source of numbered samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from training.data.batch import BatchRecord
from training.data.decode import Sample, UnusableSample
from training.data.lanes import Deal, shard_of_slot
from training.data.loader import TrainLoader
from training.data.position import StreamIdentity, StreamPosition, read_position
from training.data.sources import NO_COUNTERS
from training.data.tar_reader import RawSample

SEED = 11
Id = tuple[int, int]


class NumberSource:
    """Shards of given sizes in epoch mode; a sample's key says where it comes from."""

    source_names = ("numbers",)
    parts = 1
    counters = NO_COUNTERS

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.slots_per_epoch = len(self.sizes)

    def size(self, slot: int) -> int:
        return self.sizes[shard_of_slot(slot, num_shards=len(self.sizes), seed=SEED)]

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        assert offset in (0, 512 * start)
        for index in range(start, self.size(slot)):
            yield RawSample(f"{slot}/{index}", {}, 512 * index)

    def shard_name(self, slot: int) -> str:
        return f"slot {slot}"

    def source_of(self, slot: int) -> int:
        return 0

    def epoch(self) -> set[Id]:
        return {(slot, index) for slot in range(self.slots_per_epoch) for index in range(self.size(slot))}


class NumberDecoder:
    """Decodes to one pixel; every ``bad_every``-th sample is unusable."""

    def __init__(self, bad_every: int = 0) -> None:
        self.bad_every = bad_every

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        slot, index = map(int, raw.key.split("/"))
        if self.bad_every and (7 * slot + index) % self.bad_every == 0:
            raise UnusableSample("broken_image")
        return Sample(raw.key, torch.full((3, 1, 1), seed % 256, dtype=torch.uint8), raw.key)


def key_tokens(texts: Sequence[str], /) -> Tensor:
    """[n, 2]: slot and index out of the key."""
    return torch.tensor([[int(part) for part in text.split("/")] if text else [0, 0] for text in texts])


@dataclass
class Job:
    """Consecutive runs of one job, each on its own number of ranks."""

    source: NumberSource
    lanes: int
    block: int
    decoder: NumberDecoder = field(default_factory=NumberDecoder)
    workers: int = 0
    position: StreamPosition | None = None

    def loaders(self, world: int, batch: int, *, lanes: int = 0, block: int = 0) -> list[TrainLoader]:
        """The loaders of all ranks, where the job stands; ``lanes`` and ``block`` as asked for by flags."""
        loaders = [
            TrainLoader(
                self.source,
                identity=StreamIdentity(SEED, False, "numbers"),
                deal=Deal(self.lanes, self.block, SEED),
                rank=rank,
                world_size=world,
                batch_size=batch,
                image_size=(1, 1),
                decoder=self.decoder,
                tokenizer=key_tokens,
                num_workers=self.workers,
                num_batches=1,
                num_samples=sum(self.source.sizes),
                requested_lanes=lanes,
                requested_block=block,
            )
            for rank in range(world)
        ]
        for loader in loaders if self.position is not None else ():
            # As a checkpoint does: through tensors and JSON.
            loader.load_position(read_position(self.position.tensors(), self.position.facts()))
        return loaders

    def run(self, world: int, batch: int, steps: int, *, lanes: int = 0, block: int = 0) -> list[list[Id]]:
        """The samples of every step, all ranks together in rank order; more batches are read than are committed."""
        loaders = self.loaders(world, batch, lanes=lanes, block=block)
        streams = [list(islice(loader, steps + 1)) for loader in loaders]
        for loader, stream in zip(loaders, streams, strict=True):
            for loaded in stream[:steps]:
                loader.commit(loaded.record)
        self.position = loaders[0].merge([loader.position() for loader in loaders])
        return [[sample for stream in streams for sample in ids(stream[step].record)] for step in range(steps)]

    def lane_stream(self, lane: int, count: int) -> list[Id]:
        """What a lane emits from the very beginning."""
        alone = Job(self.source, self.lanes, self.block, self.decoder)
        loader = alone.loaders(self.lanes, 1)[lane]
        return [sample for batch in islice(loader, count) for sample in ids(batch.record)]


def ids(record: BatchRecord) -> list[Id]:
    return [(slot, index) for slot, index, _ in record.samples.tolist()]


def counted(steps: Sequence[Sequence[Id]]) -> Counter[Id]:
    return Counter(sample for step in steps for sample in step)
