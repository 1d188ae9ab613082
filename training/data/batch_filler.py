"""What one loader worker does: takes its lanes' samples in turn, decodes them, and writes them into a batch's rows.

Row i of a rank's batch comes from lane (cursor + i) mod n of the rank's n lanes, and worker m of M serves the lanes
m, m+M, ...: the workers share the work, and their number changes nothing in what a batch holds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from training.data.batch import BatchBuffers
from training.data.decode import Sample, UnusableSample
from training.data.lane_reader import LaneReader, ReadNotes, Source
from training.data.lanes import Deal, LanePosition, mix
from training.data.tar_reader import RawSample

_MAX_UNUSABLE_IN_A_ROW = 1000
_MAX_UNUSABLE_SLOTS = 8
_READ_AHEAD_THREADS = 4


class Decoder(Protocol):
    """``training.data.decode.SampleDecoder``, or anything that decodes like it."""

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        """Raises UnusableSample."""


class TokenizeFunction(Protocol):
    """Texts to ids [n, L]."""

    def __call__(self, texts: Sequence[str], /) -> Tensor:
        """int64 [n, L]"""


@dataclass(frozen=True)
class RankStream:
    """A rank's stream from where it stands. Pickled once for all workers of the rank."""

    source: Source
    decoder: Decoder
    tokenizer: TokenizeFunction
    deal: Deal
    lanes: range
    positions: tuple[LanePosition, ...]
    """One per lane of ``lanes``."""
    cursor: int
    """Index into ``lanes`` of the next sample's lane."""
    batch_size: int


class Chunk(NamedTuple):
    """What a worker reports of its rows of one batch."""

    positions: dict[int, LanePosition]
    """By index into the rank's lanes, of the lanes that gave a sample."""
    counts: Counter[str]
    """``read``, ``bytes``, ``retries``..., ``skipped/REASON``, ``source/N``, and microseconds ``decode_us`` ..."""
    bad_shards: Counter[str]
    """Unusable samples by shard."""
    notes: ReadNotes


@dataclass
class _Rows:
    """A worker's rows of one batch: tensors and counters are made once for all of them, not for each (12 us)."""

    numbers: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    """``SAMPLE_COLUMNS`` of every row."""
    read: int = 0
    read_ns: int = 0
    decode_ns: int = 0
    tokenize_ns: int = 0

    def add_to(self, counts: Counter[str]) -> None:
        """What ``Chunk.counts`` says of them."""
        counts["read"] += self.read
        for name in ("read", "decode", "tokenize"):
            counts[f"{name}_us"] += getattr(self, f"{name}_ns") // 1000
        for source, count in Counter(source for _, _, source in self.samples).items():
            counts[f"source/{source}"] += count


class BatchFiller:
    """Fills its rows of one batch after another, for ever."""

    def __init__(self, stream: RankStream, *, worker: int = 0, num_workers: int = 1, read_ahead: bool = False) -> None:
        self._stream = stream
        self._worker = worker
        self._num_workers = num_workers
        self._cursor = stream.cursor
        executor = ThreadPoolExecutor(_READ_AHEAD_THREADS, "read-ahead") if read_ahead else None
        # Opened in the order in which they are needed.
        turns = [(stream.cursor + turn) % len(stream.lanes) for turn in range(len(stream.lanes))]
        self._readers = {
            index: LaneReader(
                stream.source, stream.deal, stream.lanes[index], stream.positions[index], executor=executor
            )
            for index in turns
            if index % num_workers == worker
        }
        self._storage_counts: Counter[str] = Counter()

    def fill(self, buffers: BatchBuffers) -> Chunk:
        """Writes this worker's rows of the next batch.

        Raises:
            ValueError: none of very many samples in a row can be used.
        """
        stream = self._stream
        chunk = Chunk({}, Counter(), Counter(), ReadNotes())
        rows = _Rows()
        for row in range(stream.batch_size):
            index = (self._cursor + row) % len(stream.lanes)
            if index % self._num_workers == self._worker:
                self._fill_row(buffers, row, index, chunk, rows)
        self._cursor = (self._cursor + stream.batch_size) % len(stream.lanes)
        if rows.numbers:
            start = time.perf_counter_ns()
            numbers = torch.tensor(rows.numbers)
            buffers.texts[numbers] = stream.tokenizer(rows.captions)
            buffers.samples[numbers] = torch.tensor(rows.samples)
            rows.tokenize_ns = time.perf_counter_ns() - start
        rows.add_to(chunk.counts)
        chunk.counts["slots_ended"] += len(chunk.notes.ended)
        chunk.counts["slot_samples"] += sum(chunk.notes.ended)
        self._count_storage(chunk.counts)
        return chunk

    def _fill_row(self, buffers: BatchBuffers, row: int, index: int, chunk: Chunk, rows: _Rows) -> None:
        """Decodes the lane's next usable sample into a row, counting what is left out."""
        stream, reader = self._stream, self._readers[index]
        unusable, slots = 0, set[int]()
        done = time.perf_counter_ns()
        # One shard may be all bad; several in a row mean that something else is wrong.
        while unusable < _MAX_UNUSABLE_IN_A_ROW or len(slots) < _MAX_UNUSABLE_SLOTS:
            taken = reader.take(chunk.notes)
            start = time.perf_counter_ns()
            rows.read_ns += start - done
            rows.read += 1
            try:
                sample = stream.decoder.decode(taken.raw, seed=mix(stream.deal.seed, *taken.id))
            except UnusableSample as fault:
                chunk.counts[f"skipped/{fault.reason}"] += 1
                chunk.bad_shards[stream.source.shard_name(taken.id.slot)] += 1
                unusable += 1
                slots.add(taken.id.slot)
                done = time.perf_counter_ns()
                continue
            buffers.put_image(row, sample.image)
            if sample.on_host:
                chunk.counts[f"decoded_on_host/{sample.on_host}"] += 1
            rows.decode_ns += time.perf_counter_ns() - start
            rows.numbers.append(row)
            rows.captions.append(sample.caption)
            rows.samples.append((*taken.id, stream.source.source_of(taken.id.slot)))
            chunk.positions[index] = taken.position
            return
        reasons = {name: count for name, count in chunk.counts.items() if name.startswith("skipped/")}
        raise ValueError(
            f"{unusable} samples in a row cannot be used (last: {taken.raw.key!r} of "
            f"{stream.source.shard_name(taken.id.slot)} with members {sorted(taken.raw.members)}; {reasons}): check "
            "--train-data, --image-key and --text-key."
        )

    def _count_storage(self, counts: Counter[str]) -> None:
        now = Counter(self._stream.source.counters)
        counts.update(now - self._storage_counts)
        self._storage_counts = now
