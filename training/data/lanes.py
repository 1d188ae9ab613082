"""Which sample comes when: pure functions of (seed, sources, lanes), never of time, processes or their number.

A *slot* is one reading of one shard (or of a part of one). A *lane* l of L reads slots l, l+L, l+2L, ... and shuffles
the samples of a slot in blocks. Rank r of W owns the lanes l with l mod W == r and takes one sample of each in turn.

    slots   0 1 2 3 4 5 6 7 ...      lane 0 of 3: 0 3 6 ...      lane 1: 1 4 7 ...      lane 2: 2 5 8 ...

Ranks and workers only decide who reads a lane, never what is in it. Dealing slots to another number of lanes is a new
``Deal``: the rests of the slots that were begun come first, then the slots that nobody has touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class LanePosition(NamedTuple):
    """Where a lane stands. In a checkpoint: 20 bytes."""

    turn: int = 0
    """Slots this lane has finished."""
    block_start: int = 0
    """Raw index, within the slot, of the block's first sample."""
    taken: int = 0
    """Samples consumed of the block, usable or not."""
    offset: int = 0
    """Byte in the shard where the block begins; 0 where that is unknown or the start."""


class SampleId(NamedTuple):
    """The identity of one reading of one sample; everything random about it is keyed by these."""

    slot: int
    raw_index: int
    """Place within the slot, in file order."""


class Piece(NamedTuple):
    """A slot, or the unread rest of one that an earlier deal had begun."""

    slot: int
    block_start: int = 0
    taken: int = 0
    offset: int = 0
    block: int = 0
    """Length of the block that was begun; 0 where none was."""


def mix(*words: int) -> int:
    """A 64-bit hash of integers. Source: splitmix64 finalizer (Steele et al. 2014), chained."""
    state = 0
    for word in words:
        state = _finalize((state ^ (word & _MASK)) + _SPLITMIX_INCREMENT & _MASK)
    return state


def _finalize(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def permutation(n: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(n) keyed by integers, the same on every machine and version of numpy."""
    z = np.arange(n, dtype=np.uint64) * np.uint64(_SPLITMIX_INCREMENT) + np.uint64(mix(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


@lru_cache(maxsize=2)  # lanes are in one epoch or the next
def epoch_order(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of n shards (or rows) in one epoch."""
    return permutation(n, seed, epoch)


def shard_of_slot(slot: int, *, num_shards: int, seed: int) -> int:
    """Epoch mode: slots [e N, (e+1) N) visit every shard once, in an order of their own for every epoch e."""
    epoch, place = divmod(slot, num_shards)
    return int(epoch_order(num_shards, seed=seed, epoch=epoch)[place])


def slot_draw(slot: int, *, seed: int) -> float:
    """Resampled mode: the slot's own uniform number in [0, 1), whatever was drawn for the others."""
    return (mix(seed, slot) >> 11) / 2**53  # the bits that a float has: 64 of them could round to 1


def drawn_shard(slot: int, *, cumulative_weights: npt.NDArray[np.float64], seed: int) -> int:
    """Resampled mode: an independent draw per slot, with probability proportional to the shard's weight."""
    point = slot_draw(slot, seed=seed) * cumulative_weights[-1]
    return int(np.searchsorted(cumulative_weights, point, side="right"))


def block_order(length: int, *, seed: int, slot: int, block_start: int) -> list[int]:
    """The order in which a block's samples are taken."""
    order: list[int] = permutation(length, seed, slot, block_start).tolist()
    return order


def owned_lanes(num_lanes: int, *, rank: int, world_size: int) -> range:
    """The lanes of a rank, in the order of its turns."""
    return range(rank, num_lanes, world_size)


def first_turn(num_lanes: int, *, emitted: int, rank: int, world_size: int) -> int:
    """Which of a rank's lanes gives its next sample after ``emitted`` samples of all ranks of another world.

    With W dividing L this carries the one global round robin on, so that the global batches stay the same.
    """
    place = -(-(emitted % num_lanes - rank) // world_size)
    return place % len(owned_lanes(num_lanes, rank=rank, world_size=world_size))


def _no_pieces() -> npt.NDArray[np.int64]:
    return np.zeros((0, len(Piece._fields)), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Deal:
    """How slots are dealt to lanes, and how their samples are cut into blocks.

    Turn t of lane l is item t L + l of the list: first ``pieces``, then the slots from ``first_slot`` on, for ever.
    """

    num_lanes: int
    block: int
    seed: int
    first_slot: int = 0
    pieces: npt.NDArray[np.int64] = field(default_factory=_no_pieces)
    """[P, 5]: one ``Piece`` a row."""

    def piece(self, lane: int, turn: int) -> Piece:
        """What a lane reads in a turn."""
        return self._item(lane + turn * self.num_lanes)

    def _item(self, item: int) -> Piece:
        begun = len(self.pieces)
        if item < begun:
            return Piece(*self.pieces[item].tolist())
        return Piece(self.first_slot + item - begun)

    def start(self, lane: int, turn: int) -> LanePosition:
        """Where a lane's turn begins."""
        piece = self.piece(lane, turn)
        return LanePosition(turn, piece.block_start, piece.taken, piece.offset)

    def turn_of_slot(self, lane: int, slot: int) -> int:
        """The lane's first turn whose slot is ``slot`` or a later one (for a deal without pieces)."""
        return max(0, -(-(slot - self.first_slot - lane) // self.num_lanes))

    def block_length(self, lane: int, turn: int, block_start: int) -> int:
        """Samples in the block that begins at ``block_start``, if the slot does not end before.

        The first block of a slot is cut short by a keyed amount: otherwise all lanes would need a new block at once.
        """
        piece = self.piece(lane, turn)
        if piece.block and block_start == piece.block_start:
            return piece.block
        if block_start == 0:
            return 1 + mix(self.seed, piece.slot, self.block) % self.block
        return self.block

    def again(self, positions: list[LanePosition], *, num_lanes: int, block: int) -> Deal:
        """Deals what is unread to another number of lanes, or in other blocks: every sample once, in a new order.

        Args:
            positions: where each of this deal's lanes stands.
        """
        current = [lane + position.turn * self.num_lanes for lane, position in enumerate(positions)]
        last = max(max(current), len(self.pieces) - 1)
        unread = [
            self._rest(lane, position, item)
            for lane, (position, item) in enumerate(zip(positions, current, strict=True))
        ]
        for item in current:
            unread += [(later, self._item(later)) for later in range(item + self.num_lanes, last + 1, self.num_lanes)]
        pieces = np.array([piece for _, piece in sorted(unread)], dtype=np.int64)
        return Deal(num_lanes, block, self.seed, self.first_slot + last + 1 - len(self.pieces), pieces)

    def _rest(self, lane: int, position: LanePosition, item: int) -> tuple[int, Piece]:
        start = self.start(lane, position.turn)
        if position == start:
            return item, self._item(item)
        block = self.block_length(lane, position.turn, position.block_start)
        slot = self._item(item).slot
        return item, Piece(slot, position.block_start, position.taken, position.offset, block)
