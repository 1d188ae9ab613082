"""The training loader: an endless stream of batches whose position can be saved, and restored on any number of ranks.

    lanes -> workers -> rows of a batch in shared memory -> Batch -> trainer, which commits what it has consumed

What a batch holds depends on the seed, the sources, the deal and the rank; never on the number of workers.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from training.data.accounting import mean_slot_samples
from training.data.batch import Batch, BatchBuffers, BatchRecord
from training.data.batch_filler import BatchFiller, Chunk, Decoder, RankStream, TokenizeFunction
from training.data.decode import UnusableSample
from training.data.lane_reader import SHARD_EMPTY, LaneReader, ReadNotes, Source
from training.data.lanes import Deal, LanePosition, first_turn, mix, owned_lanes
from training.data.position import RankPosition, StreamIdentity, StreamPosition, merge_ranks
from training.data.ring import BatchRing, RingLayout
from training.data.worker_pool import WorkerDied, WorkerPool

logger = logging.getLogger(__name__)

_RING_SLOTS = 3
"""One that the trainer copies from, two that the workers fill ahead of it."""
_RESTARTS = 3
"""Of a rank's workers, without a batch in between."""
_FIRST_SLOTS, _FIRST_SAMPLES = 8, 125
_WORST_SHARDS = 20
_SAMPLES_OF_THE_SHARE = 1000
_HARDLY_BEGUN = 0.01
"""Of an epoch."""


class NewStream(NamedTuple):
    """Other sources, or another order, took over at a resume."""

    first_epoch: float
    """Of the new stream: after those that were begun of the old one."""
    unread_samples: int
    """About so many of the epochs that were begun will not be seen."""


class TrainLoader:
    """Iterates over batches for ever; the trainer cuts epochs and commits what it has consumed."""

    def __init__(
        self,
        source: Source,
        *,
        identity: StreamIdentity,
        deal: Deal,
        rank: int,
        world_size: int,
        batch_size: int,
        image_size: tuple[int, int],
        decoder: Decoder,
        tokenizer: TokenizeFunction,
        num_workers: int,
        num_batches: int,
        num_samples: int,
        requested_lanes: int = 0,
        requested_block: int = 0,
        pin: Callable[[Tensor], Callable[[], None]] | None = None,
        file_room: int = 0,
    ) -> None:
        """
        Args:
            image_size: (height, width) of what the decoder returns.
            num_workers: processes; 0 loads in this one.
            requested_lanes: what the user asked for; 0 keeps a resumed run's. Likewise ``requested_block``.
            pin: makes memory page-locked for copies to the device; returns what undoes that.
            file_room: bytes of a row that may hold a JPEG for the device to decode; 0: the decoder decodes all.
        """
        self.num_batches = num_batches
        """Batches per epoch and rank."""
        self.num_samples = num_samples
        """Samples per epoch, all ranks together."""
        self.source = source
        self.identity = identity
        self.deal = deal
        self.batch_size = batch_size
        self.world_size = world_size
        self.accepts_new_stream = False
        """Whether a position of another stream may be loaded: the user wants other data."""
        self.new_stream: NewStream | None = None
        """Set if that has happened."""
        self.totals: Counter[str] = Counter()
        """What this rank has read, skipped, retried, ...; on rank 0 with what was counted before a resume."""
        self.bad_shards: Counter[str] = Counter()
        self._rank = rank
        self._image_size = image_size
        self._decoder = decoder
        self._tokenizer = tokenizer
        self.num_workers = num_workers
        self._requested_lanes = requested_lanes
        self._requested_block = requested_block
        self._pin = pin
        self._file_room = file_room
        self._told_host_share = not file_room
        self._before_start: Counter[str] = Counter()
        self._cursor = 0
        self._emitted = 0
        self._positions = [deal.start(lane, 0) for lane in self.lanes]

    @property
    def lanes(self) -> range:
        """The lanes of this rank."""
        return owned_lanes(self.deal.num_lanes, rank=self._rank, world_size=self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the committed position on. Worker processes end when the iterator is dropped."""
        if self.num_workers == 0:
            return self._load_here()
        return self._load_in_workers()

    def _load_here(self) -> Iterator[Batch]:
        filler = BatchFiller(self._stream(self._positions, self._cursor))
        while True:
            buffers = _new_buffers(self._layout(1))
            yield _batch(buffers, [filler.fill(buffers)])

    def _load_in_workers(self) -> Iterator[Batch]:
        """Dead workers are replaced by new ones that go on after the last batch that came through."""
        positions, cursor = list(self._positions), self._cursor
        deaths = 0
        while True:
            with self._workers(positions, cursor) as pool:
                try:
                    while True:
                        buffers, chunks = pool.next_batch()
                        batch = _batch(buffers, chunks)
                        if deaths:
                            batch.record.counts["worker_restarts"] += deaths
                            deaths = 0
                        for index, position in batch.record.positions.items():
                            positions[index] = position
                        cursor = (cursor + self.batch_size) % len(positions)
                        yield batch
                        pool.release()
                except WorkerDied as death:
                    deaths += 1
                    if deaths > _RESTARTS:
                        raise
                    logger.warning("%s Starting the workers again (%d of %d).", death, deaths, _RESTARTS)

    @contextmanager
    def _workers(self, positions: Sequence[LanePosition], cursor: int) -> Iterator[WorkerPool]:
        """Workers that begin at a position, with a ring of their own: no predecessor may write into it."""
        layout = self._layout(_RING_SLOTS)
        ring = BatchRing(layout)
        unpin = self._pin(ring.whole()) if self._pin is not None else None
        pool = WorkerPool(self._stream(positions, cursor), layout=layout, num_workers=self.num_workers, ring=ring)
        try:
            yield pool
        finally:
            pool.close()
            if unpin is not None:
                unpin()
            ring.close()

    def _stream(self, positions: Sequence[LanePosition], cursor: int) -> RankStream:
        return RankStream(
            source=self.source,
            decoder=self._decoder,
            tokenizer=self._tokenizer,
            deal=self.deal,
            lanes=self.lanes,
            positions=tuple(positions),
            cursor=cursor,
            batch_size=self.batch_size,
        )

    def _layout(self, num_slots: int) -> RingLayout:
        context_length = self._tokenizer([""]).shape[1]
        return RingLayout(num_slots, self.batch_size, self._image_size, context_length, self._file_room)

    def check_first_sample(self) -> None:
        """Decodes one sample of this rank in this process: wrong keys or a dead source show before the first step.

        One bad shard is no reason to stop: the first samples of several are tried.

        Raises:
            ValueError: none of them can be used. RuntimeError: the storage gives nothing.
        """
        lane = self.lanes[0]
        reasons: Counter[str] = Counter()
        for turn in range(_FIRST_SLOTS):
            reader = LaneReader(self.source, replace(self.deal, block=1), lane, self.deal.start(lane, turn))
            for _ in range(_FIRST_SAMPLES):
                raw, sample_id, _ = reader.take(ReadNotes())
                try:
                    self._decoder.decode(raw, seed=mix(self.identity.seed, *sample_id))
                    return
                except UnusableSample as fault:
                    reasons[fault.reason] += 1
        raise ValueError(
            f"{reasons.total()} samples in a row cannot be used (last: {raw.key!r} with members {sorted(raw.members)}; "
            f"reasons: {dict(reasons)}): check --train-data, --image-key and --text-key."
        )

    def commit(self, batch: BatchRecord) -> None:
        """Marks a batch as consumed: a position taken from now on continues after it."""
        for index, position in batch.positions.items():
            self._positions[index] = position
        self._cursor = (self._cursor + self.batch_size) % len(self._positions)
        self._emitted += self.batch_size * self.world_size
        self.totals.update(batch.counts)
        self.bad_shards.update(batch.bad_shards)
        for slot, index in batch.undecodable:
            shard = self.source.shard_name(slot)
            self.bad_shards[shard] += 1
            logger.warning("Sample %d of %s cannot be decoded: another was shown twice.", index, shard)
        if not self._told_host_share:
            self._tell_host_share()
        for fault in batch.faults:
            lost = 0 if fault.reason == SHARD_EMPTY else self._probably_lost(fault.samples_before)
            self.totals[f"lost/{fault.reason}"] += 1
            self.totals["lost_samples"] += lost
            self.bad_shards[fault.shard] += lost
            logger.warning("About %d samples of %s are left out: %s", lost, fault.shard, fault.detail)

    def _tell_host_share(self) -> None:
        """Once in a start: a data set that the device can do little for is loaded faster without it."""
        counts = self.totals - self._before_start
        if counts["read"] < _SAMPLES_OF_THE_SHARE:
            return
        self._told_host_share = True
        prefix = "decoded_on_host/"
        reasons = {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}
        if self._rank == 0:
            share = 100 * sum(reasons.values()) / counts["read"]
            logger.info("--decode gpu: %.1f %% of the images so far were decoded on the host: %s.", share, reasons)

    def _probably_lost(self, samples_before: int) -> int:
        """What a slot held is not known: as many as others, or as many again as could be read of it."""
        by_epoch = self.num_samples // self.source.slots_per_epoch
        mean = mean_slot_samples(self.totals) or 2 * samples_before or by_epoch
        return max(1, round(mean) - samples_before)

    def position(self) -> RankPosition:
        """Where this rank's lanes stand."""
        worst = Counter(dict(self.bad_shards.most_common(_WORST_SHARDS)))
        return RankPosition(tuple(self._positions), self._cursor, Counter(self.totals), worst)

    def merge(self, ranks: Sequence[RankPosition]) -> StreamPosition:
        """The position of the job from those of all ranks."""
        return merge_ranks(ranks, identity=self.identity, deal=self.deal, emitted=self._emitted)

    def epoch_of_lanes(self) -> tuple[float, float, float]:
        """(least, mean, greatest) number of passes over the data that a lane of this rank has begun or finished."""
        places = zip(self.lanes, self._positions, strict=True)
        slots = [self.deal.piece(lane, position.turn).slot for lane, position in places]
        epochs = [slot / self.source.slots_per_epoch for slot in slots]
        return min(epochs), sum(epochs) / len(epochs), max(epochs)

    def load_position(self, saved: StreamPosition) -> None:
        """Goes on where the job stood, on any number of ranks. Deals anew where another number of lanes is asked for.

        Shards that lie elsewhere now are still the same. Where ``accepts_new_stream`` allows others, they begin at the
        epoch after those that were begun.

        Raises:
            ValueError: the position belongs to another stream (other sources or seed), which was not allowed.
        """
        if not self._is_of_this_stream(saved.identity):
            self._start_new_stream(saved)
        else:
            lanes, block = self._lanes_and_block(saved)
            if (lanes, block) != (saved.deal.num_lanes, saved.deal.block):
                self._deal_again(saved, lanes=lanes, block=block)
            else:
                self._continue(saved)
        if self._rank == 0:
            self.totals, self.bad_shards = Counter(saved.totals), Counter(saved.bad_shards)
            self._before_start = Counter(saved.totals)

    def _lanes_and_block(self, saved: StreamPosition) -> tuple[int, int]:
        lanes = self._requested_lanes or saved.deal.num_lanes
        if not self._requested_lanes and lanes < self.world_size:
            lanes = self.deal.num_lanes
            logger.warning("%d data lanes for %d ranks: dealing to %d.", saved.deal.num_lanes, self.world_size, lanes)
        # Without a wish: as before, or as suits another number of lanes.
        block = self._requested_block or (self.deal.block if lanes != saved.deal.num_lanes else saved.deal.block)
        return lanes, block

    def _is_of_this_stream(self, saved: StreamIdentity) -> bool:
        if self.identity.same_stream(saved):
            return True
        if self.identity.moved_from(saved):
            logger.info("The shards are the checkpoint's, in another place: the data goes on where it stood.")
            return True
        if self.accepts_new_stream:
            return False
        differing = [
            f"{name}: saved {theirs!r}, now {ours!r}"
            for name, theirs, ours in zip(StreamIdentity._fields[:3], saved, self.identity, strict=False)
            if theirs != ours
        ]
        raise ValueError(
            f"The checkpoint's data position belongs to another stream ({'; '.join(differing)}), and no setting says "
            "that this is meant: give the same shards to --train-data, or pass --allow-config-change train-data to go "
            "on with what is there now, from the next epoch on."
        )

    def _start_new_stream(self, saved: StreamPosition) -> None:
        """Begins with the epoch after those begun; when resampled, which knows no epochs, at the same progress."""
        slots = self.source.slots_per_epoch
        old_slots = saved.identity.slots_per_epoch or slots
        slot_samples = mean_slot_samples(saved.totals) or saved.identity.slot_samples or self.num_samples / slots
        progress = saved.progress(slots_per_epoch=old_slots, slot_samples=slot_samples)
        # Lanes are not all equally far: an epoch of which hardly anything was read has not begun.
        epoch = progress if self.identity.resampled else float(math.ceil(progress - _HARDLY_BEGUN))
        unread = 0 if saved.identity.resampled else round(max(0.0, epoch - progress) * old_slots * slot_samples)
        first_slot = math.ceil(epoch * slots)
        self.new_stream = NewStream(first_slot / slots, unread)
        logger.warning(
            "Other data than the checkpoint's: it begins with epoch %.4g. About %d samples of the epoch that was begun "
            "of the old data stay unread.",
            *self.new_stream,
        )
        # Lanes as before, so that later resumes on other ranks go on as well, if the new data is enough for them.
        kept = self.world_size <= saved.deal.num_lanes <= slots
        lanes, block = self._lanes_and_block(saved) if kept else (self.deal.num_lanes, self.deal.block)
        self.deal = Deal(lanes, block, self.identity.seed, first_slot)
        self._positions = [self.deal.start(lane, 0) for lane in self.lanes]
        self._cursor = self._emitted = 0

    def _deal_again(self, saved: StreamPosition, *, lanes: int, block: int) -> None:
        logger.info(
            "Dealing the unread data anew: %d lanes in blocks of %d become %d in blocks of %d. Every sample is still "
            "seen once, in another order.",
            *(saved.deal.num_lanes, saved.deal.block, lanes, block),
        )
        self.deal = saved.deal.again(list(saved.lanes), num_lanes=lanes, block=block)
        self._positions = [self.deal.start(lane, 0) for lane in self.lanes]
        self._cursor = self._emitted = 0

    def _continue(self, saved: StreamPosition) -> None:
        self.deal = saved.deal
        self._positions = [saved.lanes[lane] for lane in self.lanes]
        self._emitted = saved.emitted
        if len(saved.cursors) == self.world_size:
            self._cursor = saved.cursors[self._rank]
        else:
            logger.info("The data goes on over %d ranks, before: %d.", self.world_size, len(saved.cursors))
            self._cursor = first_turn(
                saved.deal.num_lanes, emitted=saved.emitted, rank=self._rank, world_size=self.world_size
            )

    def start_at_epoch(self, epoch: int) -> None:
        """Begins with the first slots of an epoch: for checkpoints that carry no position (OpenCLIP's own)."""
        first_slot = epoch * self.source.slots_per_epoch
        self._positions = [self.deal.start(lane, self.deal.turn_of_slot(lane, first_slot)) for lane in self.lanes]


def _new_buffers(layout: RingLayout) -> BatchBuffers:
    return layout.buffers([torch.empty(shape, dtype=dtype) for dtype, shape in layout.parts])


def _batch(buffers: BatchBuffers, chunks: Sequence[Chunk]) -> Batch:
    record = BatchRecord(
        positions={index: position for chunk in chunks for index, position in chunk.positions.items()},
        samples=buffers.samples.clone(),
        counts=sum((chunk.counts for chunk in chunks), Counter()),
        bad_shards=sum((chunk.bad_shards for chunk in chunks), Counter()),
        faults=[fault for chunk in chunks for fault in chunk.notes.faults],
    )
    return Batch(buffers.images, buffers.texts, record, buffers.encoded)
