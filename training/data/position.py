"""Where the data stream of a whole job stands: what a checkpoint holds of it, whatever ranks and workers come next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.data.lanes import Deal, LanePosition, Piece, owned_lanes

_WORST_SHARDS = 100


class StreamIdentity(NamedTuple):
    """What the order of samples depends on, beside the deal; a position means nothing in another stream."""

    seed: int
    resampled: bool
    sources: str
    """Digest of the sources in order."""
    names: str = ""
    """The same without the directories that they lie in; empty where that is unknown."""
    source_digests: tuple[str, ...] = ()
    """Of every source alone, with its directories."""
    slots_per_epoch: int = 0
    """0 where a version of this program wrote the position that did not say; likewise the next."""
    slot_samples: float = 0.0
    """Of a slot, by the number of samples in an epoch."""

    def same_stream(self, other: StreamIdentity) -> bool:
        """Whether a position in the other stream is one in this."""
        return self[:3] == other[:3]

    def moved_from(self, saved: StreamIdentity) -> bool:
        """Whether this is the saved stream from other directories: a position in that stream is one in this.

        Sources that changed places among each other have not moved: their shards may have the same names.
        """
        if not self.names or self[:2] != saved[:2] or self.names != saved.names:
            return False
        was_at = {digest: place for place, digest in enumerate(saved.source_digests)}
        return all(was_at.get(digest, place) == place for place, digest in enumerate(self.source_digests))


@dataclass(frozen=True)
class RankPosition:
    """Where one rank's lanes stand."""

    lanes: Sequence[LanePosition]
    cursor: int
    """Index into the rank's lanes of the next sample's lane."""
    totals: Counter[str] = field(default_factory=Counter)
    """Read, skipped and so on since the run began; only rank 0 knows what was counted before a resume."""
    bad_shards: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class StreamPosition:
    """Where all lanes stand, between two steps."""

    identity: StreamIdentity
    deal: Deal
    lanes: Sequence[LanePosition]
    emitted: int
    """Samples of all ranks since the deal began."""
    cursors: Sequence[int]
    """By rank of the world that saved the position."""
    totals: Counter[str] = field(default_factory=Counter)
    bad_shards: Counter[str] = field(default_factory=Counter)

    def tensors(self) -> dict[str, Tensor]:
        """20 bytes a lane, and 40 a piece of an earlier deal."""
        lanes = torch.tensor(self.lanes, dtype=torch.int64)  # [L, 4]
        return {
            "lanes": lanes[:, :3].to(torch.int32),
            "offsets": lanes[:, 3].contiguous(),
            "pieces": torch.from_numpy(self.deal.pieces),
        }

    def progress(self, *, slots_per_epoch: int, slot_samples: float) -> float:
        """Epochs that were read, about: how much of a slot was read is judged by what slots hold on average."""
        deal, begun_samples = self.deal, 0
        for lane, position in enumerate(self.lanes):
            start = deal.start(lane, position.turn)
            begun_samples += position.block_start + position.taken - start.block_start - start.taken
        # Of what lies before this deal, only its pieces are unread.
        finished = deal.first_slot - len(deal.pieces) + sum(position.turn for position in self.lanes)
        begun_before = (
            piece.block_start + piece.taken
            for item, piece in enumerate(map(Piece._make, deal.pieces.tolist()))
            if self.lanes[item % deal.num_lanes].turn <= item // deal.num_lanes
        )
        return (finished + (begun_samples + sum(begun_before)) / slot_samples) / slots_per_epoch

    def facts(self) -> dict[str, Any]:
        """The rest, in JSON types."""
        return {
            **self.identity._asdict(),
            "source_digests": list(self.identity.source_digests),
            "num_lanes": self.deal.num_lanes,
            "block": self.deal.block,
            "first_slot": self.deal.first_slot,
            "emitted": self.emitted,
            "cursors": list(self.cursors),
            "totals": dict(self.totals),
            "bad_shards": dict(self.bad_shards),
        }


def read_position(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> StreamPosition:
    """The inverse of ``tensors`` and ``facts``."""
    known = {name: facts[name] for name in StreamIdentity._fields if name in facts}
    # Synthetic data was once another stream at another image size: "synthetic (224, 224) 1000".
    known["sources"] = re.sub(r"^synthetic \(.*\) ", "synthetic ", known["sources"])
    identity = StreamIdentity(**known | {"source_digests": tuple(known.get("source_digests", ()))})
    deal = Deal(facts["num_lanes"], facts["block"], identity.seed, facts["first_slot"], tensors["pieces"].numpy())
    lanes = [
        LanePosition(turn, block_start, taken, offset)
        for (turn, block_start, taken), offset in zip(
            tensors["lanes"].tolist(), tensors["offsets"].tolist(), strict=True
        )
    ]
    totals, bad_shards = Counter(facts["totals"]), Counter(facts["bad_shards"])
    return StreamPosition(identity, deal, lanes, facts["emitted"], facts["cursors"], totals, bad_shards)


def merge_ranks(ranks: Sequence[RankPosition], *, identity: StreamIdentity, deal: Deal, emitted: int) -> StreamPosition:
    """The position of the job from those of its ranks, in rank order."""
    lanes = [LanePosition()] * deal.num_lanes
    for rank, part in enumerate(ranks):
        for lane, position in zip(
            owned_lanes(deal.num_lanes, rank=rank, world_size=len(ranks)), part.lanes, strict=True
        ):
            lanes[lane] = position
    totals = add_counters(part.totals for part in ranks)
    worst = Counter(dict(add_counters(part.bad_shards for part in ranks).most_common(_WORST_SHARDS)))
    return StreamPosition(identity, deal, lanes, emitted, [part.cursor for part in ranks], totals, worst)


def add_counters(counters: Iterable[Counter[str]]) -> Counter[str]:
    """Their sum, in time linear in their sizes (``sum`` copies it for each of them)."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total
