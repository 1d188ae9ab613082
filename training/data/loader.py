"""The training loader: an endless stream of batches whose position can be saved and restored, sample by sample.

    worker 0: its lanes in turn -> decode -> Batch  \\
    worker 1: its lanes in turn -> decode -> Batch   > the workers in turn -> trainer, which commits what it consumed

The order depends on the seed, the sources, the number of ranks and of workers, and on nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.tokenizer import Tokenizer
from training.data.batch import Batch
from training.data.decode import Sample, SampleDecoder, UnusableSample
from training.data.lanes import LanePosition, SampleId, Source, lanes_of_worker, mix, read_lane
from training.data.tar_reader import RawSample

_MAX_UNUSABLE_IN_A_ROW = 1000

LaneReader = Iterator[tuple[RawSample, SampleId, LanePosition]]


class WorkerPosition(NamedTuple):
    """Where one worker of this rank stands after a batch."""

    worker: int
    cursor: int
    """Which of the worker's lanes gives the next sample."""
    lanes: tuple[LanePosition, ...]


class StreamConfig(NamedTuple):
    """What decides the order of samples. It is saved with the position and compared when a run resumes."""

    seed: int
    num_lanes: int
    block: int
    world_size: int
    num_workers: int
    batch_size: int
    sources: str
    """Digest of the sources in order."""


class TrainLoader:
    """Iterates over batches for ever; the trainer cuts epochs and commits what it has consumed."""

    def __init__(
        self,
        source: Source,
        *,
        config: StreamConfig,
        rank: int,
        decoder: SampleDecoder,
        tokenizer: Tokenizer,
        num_batches: int,
        num_samples: int,
        processes: bool,
        pin_memory: bool = False,
    ) -> None:
        self.config = config
        self.num_batches = num_batches
        """Batches per epoch and rank."""
        self.num_samples = num_samples
        """Samples per epoch, all ranks together."""
        self.skipped: Counter[str] = Counter()
        self._rank = rank
        self._processes = processes
        self._pin_memory = pin_memory
        self._source = source
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._next_worker = 0
        self._positions = [self._start_of(worker) for worker in range(config.num_workers)]

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the committed position on. Worker processes end when the iterator is dropped."""
        # DataLoader asks its workers in turn, beginning with worker 0: the one whose turn it is must be that one.
        workers = self.config.num_workers
        order = [(self._next_worker + i) % workers for i in range(workers)]
        stream = _WorkerStream(
            self._source,
            config=self.config,
            rank=self._rank,
            decoder=self._decoder,
            tokenizer=self._tokenizer,
            positions=[self._positions[worker] for worker in order],
        )
        if not self._processes:
            return iter(stream)
        return iter(
            DataLoader(
                stream,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=2,
                pin_memory=self._pin_memory,
                # Its own: from the global generator it would draw a seed, and a resumed run another dropout mask.
                generator=torch.Generator(),
            )
        )

    def check_first_sample(self) -> None:
        """Decodes one sample of this rank in this process: wrong keys or a dead source show before anything is built.

        Raises:
            ValueError: none of the first samples can be used. StorageError: the first shard cannot be read.
        """
        lane = _lanes(self.config, rank=self._rank, worker=0)[0]
        reader = _open_lane(self._source, lane, config=self.config, position=LanePosition())
        _next_usable(reader, decoder=self._decoder, seed=self.config.seed, skipped=Counter())

    def commit(self, batch: Batch) -> None:
        """Marks a batch as consumed: a state saved from now on continues after it."""
        position: WorkerPosition = batch.position
        self._positions[position.worker] = position
        self._next_worker = (position.worker + 1) % self.config.num_workers
        self.skipped.update(batch.skipped)

    def state_dict(self) -> dict[str, Any]:
        """This rank's position, in plain JSON types."""
        return {
            "stream": self.config._asdict(),
            "next_worker": self._next_worker,
            "workers": [[position.cursor, [list(lane) for lane in position.lanes]] for position in self._positions],
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the state was saved.

        Raises:
            ValueError: the state belongs to another stream (other sources, ranks, workers, ...).
        """
        ours, theirs = self.config._asdict(), state["stream"]
        differing = [
            f"{key}: saved {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]
        ]
        if differing:
            raise ValueError(
                f"The checkpoint's data position belongs to another stream ({'; '.join(differing)}): resume with the "
                "same --train-data, --seed, --batch-size, --workers, --shuffle-block and number of ranks, or give the "
                "checkpoint to --pretrained to start a new run from its weights."
            )
        self._next_worker = int(state["next_worker"])
        self._positions = [
            WorkerPosition(worker, int(cursor), tuple(LanePosition(*lane) for lane in lanes))
            for worker, (cursor, lanes) in enumerate(state["workers"])
        ]
        self.skipped = Counter(state["skipped"])

    def start_at_epoch(self, epoch: int) -> None:
        """Begins with the first slots of an epoch: for checkpoints that carry no position (OpenCLIP's own)."""
        first_slot = epoch * self._source.slots_per_epoch
        for worker, position in enumerate(self._positions):
            lanes = _lanes(self.config, rank=self._rank, worker=worker)
            turns = [max(0, -(-(first_slot - lane) // self.config.num_lanes)) for lane in lanes]
            self._positions[worker] = position._replace(lanes=tuple(LanePosition(turn) for turn in turns))

    def _start_of(self, worker: int) -> WorkerPosition:
        lanes = _lanes(self.config, rank=self._rank, worker=worker)
        return WorkerPosition(worker, 0, tuple(LanePosition() for _ in lanes))


def _lanes(config: StreamConfig, *, rank: int, worker: int) -> range:
    return lanes_of_worker(
        num_lanes=config.num_lanes,
        rank=rank,
        world_size=config.world_size,
        worker=worker,
        num_workers=config.num_workers,
    )


class _WorkerStream(IterableDataset[Batch]):
    """What a loader process runs: its lanes in turn, decoded and batched."""

    def __init__(
        self,
        source: Source,
        *,
        config: StreamConfig,
        rank: int,
        decoder: SampleDecoder,
        tokenizer: Tokenizer,
        positions: Sequence[WorkerPosition],
    ) -> None:
        self.source = source
        self.config = config
        self.rank = rank
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.positions = positions

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        start = self.positions[info.id if info else 0]
        lane_ids = _lanes(self.config, rank=self.rank, worker=start.worker)
        readers = [
            _open_lane(self.source, lane, config=self.config, position=position)
            for lane, position in zip(lane_ids, start.lanes, strict=True)
        ]
        positions = list(start.lanes)
        cursor = start.cursor
        while True:
            samples: list[Sample] = []
            skipped: Counter[str] = Counter()
            while len(samples) < self.config.batch_size:
                sample, positions[cursor] = _next_usable(
                    readers[cursor], decoder=self.decoder, seed=self.config.seed, skipped=skipped
                )
                samples.append(sample)
                cursor = (cursor + 1) % len(readers)
            yield Batch(
                images=torch.stack([sample.image for sample in samples]),  # B x uint8 [3, H, W] -> [B, 3, H, W]
                texts=self.tokenizer([sample.caption for sample in samples]),
                position=WorkerPosition(start.worker, cursor, tuple(positions)),
                skipped=dict(skipped),
            )


def _open_lane(source: Source, lane: int, *, config: StreamConfig, position: LanePosition) -> LaneReader:
    return read_lane(source, lane, num_lanes=config.num_lanes, block=config.block, seed=config.seed, position=position)


def _next_usable(
    reader: LaneReader, *, decoder: SampleDecoder, seed: int, skipped: Counter[str]
) -> tuple[Sample, LanePosition]:
    """The lane's next sample that decodes; the ones that do not are counted by reason."""
    for attempts, (raw, sample_id, position) in enumerate(reader, start=1):
        try:
            return decoder.decode(raw, seed=mix(seed, *sample_id)), position
        except UnusableSample as fault:
            skipped[fault.reason] += 1
        if attempts == _MAX_UNUSABLE_IN_A_ROW:
            break
    raise ValueError(
        f"{_MAX_UNUSABLE_IN_A_ROW} samples in a row cannot be used (last: {raw.key!r} with members "
        f"{sorted(raw.members)}; reasons: {dict(skipped)}): check --train-data, --image-key and --text-key."
    )
