"""Which sample comes when: pure functions of (seed, sources, lanes), never of time or process ids.

A *slot* is one reading of one shard. Slot j is mapped to a shard by a keyed permutation (every shard once per epoch)
or by a keyed weighted draw (resampled). A *lane* l of L reads slots l, l+L, l+2L, ... and shuffles the samples of a
slot in blocks. A lane's position is three integers, so a checkpoint can hold it, and a resumed run goes on with the
next sample.

    slots   0 1 2 3 4 5 6 7 ...      lane 0 of 3: 0 3 6 ...      lane 1: 1 4 7 ...      lane 2: 2 5 8 ...
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from training.data.tar_reader import RawSample

_SPLITMIX_INCREMENT = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_MAX_EMPTY_SLOTS = 100


class LanePosition(NamedTuple):
    """Where a lane stands: slots finished (its turn), the first raw index of the block, samples taken of the block."""

    turn: int = 0
    block_start: int = 0
    taken: int = 0


class SampleId(NamedTuple):
    """The identity of one reading of one sample; everything random about it is keyed by these."""

    slot: int
    raw_index: int
    """Place within the slot, in file order."""


class Source(Protocol):
    """What lanes read: an endless sequence of slots."""

    slots_per_epoch: int

    def read_slot(self, slot: int, *, start: int) -> Iterator[RawSample]:
        """The samples of a slot in file order, from raw index ``start`` on."""


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


@lru_cache(maxsize=4)
def epoch_order(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of n shards (or rows) in one epoch."""
    return permutation(n, seed, epoch)


def shard_of_slot(slot: int, *, num_shards: int, seed: int) -> int:
    """Epoch mode: slots [e N, (e+1) N) visit every shard once, in an order of their own for every epoch e."""
    epoch, place = divmod(slot, num_shards)
    return int(epoch_order(num_shards, seed=seed, epoch=epoch)[place])


def drawn_shard(slot: int, *, cumulative_weights: npt.NDArray[np.float64], seed: int) -> int:
    """Resampled mode: an independent draw per slot, with probability proportional to the shard's weight."""
    point = mix(seed, slot) / 2**64 * cumulative_weights[-1]
    return int(np.searchsorted(cumulative_weights, point, side="right"))


def lanes_of_worker(*, num_lanes: int, rank: int, world_size: int, worker: int, num_workers: int) -> range:
    """Rank r owns the lanes l with l mod W == r; its workers deal them among each other the same way."""
    return range(rank + world_size * worker, num_lanes, world_size * num_workers)


def read_lane(
    source: Source, lane: int, *, num_lanes: int, block: int, seed: int, position: LanePosition
) -> Iterator[tuple[RawSample, SampleId, LanePosition]]:
    """Yields (sample, id, position after it), for ever, from ``position`` on.

    Memory: one block of undecoded samples. Resuming reads a slot up to the block's start once more, without decoding.
    """
    turn, block_start, taken = position
    empty_slots = 0
    while True:
        slot = lane + turn * num_lanes
        samples = source.read_slot(slot, start=block_start)
        while raw := list(islice(samples, block)):
            order = permutation(len(raw), seed, slot, block_start)
            for k in range(taken, len(raw)):
                index = int(order[k])
                yield raw[index], SampleId(slot, block_start + index), LanePosition(turn, block_start, k + 1)
            block_start, taken = block_start + len(raw), 0
        empty_slots = empty_slots + 1 if block_start == 0 else 0
        if empty_slots == _MAX_EMPTY_SLOTS:
            raise ValueError(f"{empty_slots} shards in a row hold no sample: check the files given to --train-data.")
        turn, block_start, taken = turn + 1, 0, 0
