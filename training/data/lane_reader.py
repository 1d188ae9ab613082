"""Reads one lane: blocks of raw samples in file order, shuffled, with the next block read ahead in a thread.

    Source -> read_blocks -> [Block, Block, ...] -> LaneReader -> (raw sample, its id, position after it)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from training.data.lanes import Deal, LanePosition, SampleId, block_order
from training.data.storage import AccessDenied, ShardChanged, ShardMissing, StorageError
from training.data.tar_reader import RawSample, TarError

_MAX_BARREN_SLOTS = 100
_MAX_BARREN_S = 20.0


class Source(Protocol):
    """What lanes read: an endless sequence of slots."""

    slots_per_epoch: int

    @property
    def parts(self) -> int:
        """Slots that a shard is cut into."""
        ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What the storage has done so far, in this process: bytes, requests, retries."""
        ...

    @property
    def source_names(self) -> Sequence[str]:
        """The names of the ``::``-joined sources."""
        ...

    def read_slot(self, slot: int, *, start: int, offset: int) -> Iterator[RawSample]:
        """The samples of a slot in file order, from raw index ``start`` on, which is at byte ``offset`` if not 0."""

    def shard_name(self, slot: int) -> str:
        """What a person calls the data of the slot: a URL, a file and row range."""

    def source_of(self, slot: int) -> int:
        """Which of the ``::``-joined sources the slot reads."""


SHARD_EMPTY = "shard_empty"


class Fault(NamedTuple):
    """The rest of a slot, or all of it, that could not be read and was left out."""

    slot: int
    shard: str
    reason: str
    detail: str
    samples_before: int
    """Of the slot, in order, that were read."""


@dataclass
class ReadNotes:
    """What was noticed between two blocks."""

    faults: list[Fault] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    """Samples of the slots that were read to their end."""

    def add(self, other: ReadNotes) -> None:
        """Appends another one's."""
        self.faults += other.faults
        self.ended += other.ended


@dataclass
class Block:
    """Consecutive raw samples of one slot, and what was noticed since the block before."""

    turn: int
    slot: int
    start: int
    taken: int
    samples: list[RawSample | None]
    notes: ReadNotes


class Taken(NamedTuple):
    """One raw sample in its lane's order."""

    raw: RawSample
    id: SampleId
    position: LanePosition
    """Of the lane, after this sample."""


def read_blocks(source: Source, deal: Deal, lane: int, position: LanePosition) -> Iterator[Block]:
    """The blocks of a lane from ``position`` on, for ever.

    A damaged tar gives its samples up to the damage, the same ones at every reading. Of a shard that storage does not
    deliver the block that breaks off is dropped as well: its length would not be the same another time.

    Raises:
        AccessDenied: at once; waiting does not mend it. StorageError: nothing but unreadable or empty shards.
    """
    barren = _BarrenSlots()
    notes = ReadNotes()
    turn, start, taken, offset = position
    while True:
        slot = deal.piece(lane, turn).slot
        first = start
        samples = source.read_slot(slot, start=start, offset=offset)
        found = False
        while True:
            length = deal.block_length(lane, turn, start)
            block, error = _take(samples, length)
            if error is not None:
                before = start + len(block)
                notes.faults.append(_fault(error, slot=slot, shard=source.shard_name(slot), samples_before=before))
            if block:
                found = True
                yield Block(turn, slot, start, taken, block, notes)
                notes = ReadNotes()
            if error is not None or len(block) < length:
                break
            start, taken = start + length, 0
        if error is None and start + len(block):
            notes.ended.append(start + len(block))
        elif error is None and first == 0 and source.parts == 1:
            name = source.shard_name(slot)
            notes.faults.append(Fault(slot, name, SHARD_EMPTY, "it holds no sample: no members with an extension.", 0))
        barren.add(found=found, shard=source.shard_name(slot), faults=notes.faults)
        turn, start, taken, offset = deal.start(lane, turn + 1)


def _take(samples: Iterator[RawSample], length: int) -> tuple[list[RawSample | None], TarError | StorageError | None]:
    """Up to ``length`` samples, and what kept them from being more."""
    block: list[RawSample | None] = []
    try:
        for raw in samples:
            block.append(raw)
            if len(block) == length:
                break
    except TarError as error:
        return block, error
    except AccessDenied:
        raise
    except StorageError as error:
        return [], error
    return block, None


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (TarError, "shard_damaged"),
    (ShardMissing, "shard_missing"),
    (ShardChanged, "shard_changed"),
    (StorageError, "shard_unreadable"),
)


def _fault(error: TarError | StorageError, *, slot: int, shard: str, samples_before: int) -> Fault:
    reason = next(name for kind, name in _REASONS if isinstance(error, kind))
    return Fault(slot, shard, reason, str(error), samples_before)


class _BarrenSlots:
    """Ends a lane that finds nothing: an empty source must not spin."""

    def __init__(self) -> None:
        self._count = 0
        self._since = time.monotonic()

    def add(self, *, found: bool, shard: str, faults: list[Fault]) -> None:
        if found:
            self._count = 0
            self._since = time.monotonic()
            return
        self._count += 1
        waited_s = time.monotonic() - self._since
        if self._count >= _MAX_BARREN_SLOTS or (faults and self._count > 1 and waited_s > _MAX_BARREN_S):
            cause = f"last: {faults[-1].detail}" if faults else f"last: {shard}, which is empty"
            raise StorageError(
                f"{self._count} shards in a row gave no sample ({cause}): check the storage and what --train-data "
                "names; the run goes on from its last checkpoint with --resume latest."
            )


class LaneReader:
    """One lane's samples in order. Memory: one block of undecoded samples, and the next one towards its end."""

    def __init__(
        self, source: Source, deal: Deal, lane: int, position: LanePosition, *, executor: Executor | None = None
    ) -> None:
        self._seed = deal.seed
        self._executor = executor
        self._blocks = read_blocks(source, deal, lane, position)
        self._block = Block(position.turn, 0, 0, 0, [], ReadNotes())
        self._order: list[int] = []
        self._offset = 0
        self._ahead: Future[Block] | None = None
        self._read_ahead()

    def take(self, notes: ReadNotes) -> Taken:
        """The next sample; what was noticed before it is added to ``notes``."""
        block = self._block
        while block.taken >= len(block.samples):
            block = self._block = self._next_block()
            notes.add(block.notes)
            first = block.samples[0]
            self._offset = first.offset if first is not None else 0
            self._order = block_order(len(block.samples), seed=self._seed, slot=block.slot, block_start=block.start)
        index = self._order[block.taken]
        raw, block.samples[index] = block.samples[index], None  # its memory is not needed any longer
        assert raw is not None
        block.taken += 1
        if 4 * block.taken >= 3 * len(block.samples):
            self._read_ahead()
        position = LanePosition(block.turn, block.start, block.taken, self._offset)
        return Taken(raw, SampleId(block.slot, block.start + index), position)

    def _read_ahead(self) -> None:
        if self._executor is not None and self._ahead is None:
            self._ahead = self._executor.submit(next, self._blocks)

    def _next_block(self) -> Block:
        if self._ahead is None:
            return next(self._blocks)
        block = self._ahead.result()
        self._ahead = None
        return block
