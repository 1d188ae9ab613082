"""Copies what a checkpoint needs of a run to host memory, each writer its share.

    whole on every rank (DDP)     each of some ranks writes some of the tensors
    rows on every rank (FSDP)     the same among the ranks that hold the same rows, for each of the rows of a copy

Both are one rule: of the copies of the state some are chosen (``choose_writers``), on different nodes where there are;
in each of them every rank writes some of what it holds, so that together they write everything once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.checkpoint.checkpointer import Share, train_json
from training.checkpoint.optimizer_state import SEPARATOR, pack_groups, pack_optimizer
from training.checkpoint.parts import choose_writers, part_name, spread
from training.checkpoint.run_state import RunParts
from training.checkpoint.staging import Staging
from training.checkpoint.tensor_file import Piece
from training.data.position import RankPosition
from training.distributed.collectives import gather_objects
from training.distributed.runtime import Runtime
from training.distributed.sharding import Placement, ShardGroup, local_state, placements, shard_group


class Captured(NamedTuple):
    """What this rank writes of a checkpoint, and which ranks write."""

    share: Share
    writers: Sequence[int]
    shard_ranks: int
    """Ranks that hold one copy of the state together; 1 where every rank holds all of it."""


class Held(NamedTuple):
    """A tensor that this rank holds."""

    tensor: Tensor
    piece: Piece | None
    """Which rows; None for a whole tensor, which all ranks hold."""
    is_common: bool = False
    """Whether rank 0's counts: BatchNorm's statistics may differ between ranks, as in data-parallel training."""

    @property
    def whole_nbytes(self) -> int:
        if self.piece is None:
            return self.tensor.nbytes
        return torch.Size(self.piece.full_shape).numel() * self.tensor.element_size()


def capture(parts: RunParts, *, runtime: Runtime, epoch: int, config: Mapping[str, Any], staging: Staging) -> Captured:
    """Copies this rank's share of the state after the current step to host memory. Collective: all ranks.

    Raises:
        ValueError: an optimizer whose state cannot be sharded.
    """
    group = shard_group(parts.model) or ShardGroup(0, 1, replica=runtime.rank, replicas=runtime.world_size)
    scalars, by_kind = _held(parts)
    nbytes = sum(held.whole_nbytes for tensors in by_kind.values() for held in tensors.values())
    facts = _Facts(parts.loader.position(), _rng_state(runtime.device), group.replica, nbytes)
    ranks = gather_objects(facts)  # collective: all ranks
    # As rank 0 counts it: a rank without rows of a parameter may have no state of it either.
    copies = choose_writers(ranks[0].whole_nbytes // group.size, world_size=group.replicas)
    writers = [rank for rank, facts in enumerate(ranks) if facts.replica in copies]
    if runtime.rank not in writers:
        return Captured(Share({}, {}), writers, group.size)
    mine = {
        kind: choose_own(tensors, group=group, place=copies.index(group.replica), count=len(copies))
        for kind, tensors in by_kind.items()
    }
    share = _stage(mine, number=writers.index(runtime.rank), count=len(writers), staging=staging)
    if not runtime.is_main:
        return Captured(share, writers, group.size)
    stream = parts.loader.merge([facts.position for facts in ranks])
    rng = {f"{rank}//{key}": value for rank, facts in enumerate(ranks) for key, value in facts.rng.items()}
    train = {
        "step": parts.state.step,
        "epoch": epoch,
        "samples_seen": parts.state.samples_seen,
        "schedule_batch": parts.state.schedule_batch,
        "samples_per_epoch": parts.state.samples_per_epoch,
        "last_batch": parts.state.last_batch,
        "phase": dict(parts.phase),
        "image_size": list(parts.model.config.vision_cfg.image_hw),
        "world_size": runtime.world_size,
        "shard_ranks": group.size,
        "optimizer": scalars,
        "param_groups": pack_groups(parts.optimizer, parts.model),
        "weights": list(by_kind["model"]),
        "scaler": parts.scaler.state_dict() if parts.scaler else None,
        "guard": parts.guard.state_dict() if parts.guard else None,
        "escalation": parts.escalation.state_dict() if parts.escalation else None,
        "data": stream.facts(),
        "config": config,
        "versions": {name: version(name) for name in ("torch", "timm", "open_clip_torch")},
    }
    files = {**share.tensors, "rng.safetensors": rng, "data.safetensors": stream.tensors()}
    return Captured(Share(files, {"train.json": train_json(train)}, share.pieces), writers, group.size)


def choose_own(tensors: Mapping[str, Held], *, group: ShardGroup, place: int, count: int) -> dict[str, Held]:
    """What one rank writes of what it holds. Pure.

    Args:
        group: the rank's.
        place: of the rank's copy among those that are chosen.
        count: copies that are chosen.
    """
    # Whole tensors are everybody's, so the first rank of a copy writes them; rows that are none need no file.
    own = {
        name: held
        for name, held in tensors.items()
        if (held.tensor.numel() > 0 if held.piece is not None else group.index == 0)
    }
    common = [name for name, held in own.items() if held.is_common]
    sizes = {name: held.tensor.nbytes for name, held in own.items() if name not in common}
    return {name: own[name] for name in [*spread(sizes, count)[place], *(common if place == 0 else ())]}


class _Facts(NamedTuple):
    """What rank 0 must know of each rank."""

    position: RankPosition
    rng: Mapping[str, Tensor]
    replica: int
    whole_nbytes: int
    """Of the state."""


def _held(parts: RunParts) -> tuple[dict[str, Any], dict[str, dict[str, Held]]]:
    """(what of the optimizer's state fits into JSON, the tensors by kind and name). Nothing is copied."""
    places = placements(parts.model)
    trained = {name for name, _ in parts.model.named_parameters()}
    optimizer, scalars = pack_optimizer(parts.optimizer, parts.model)
    model = {
        name: Held(tensor, _piece_of(tensor, places.get(name), name=name), is_common=name not in trained)
        for name, tensor in local_state(parts.model).items()
    }
    state = {
        name: Held(tensor, _piece_of(tensor, places.get(name.partition(SEPARATOR)[0]), name=name))
        for name, tensor in optimizer.items()
    }
    return scalars, {"model": model, "optimizer": state}


def _piece_of(tensor: Tensor, place: Placement | None, *, name: str) -> Piece | None:
    """Which rows a tensor holds; None where it is one number for a whole parameter, as a step count is.

    Raises:
        ValueError: neither: what is kept for other than single weights cannot be cut with them.
    """
    if place is None or tensor.ndim == 0:
        return None
    is_empty = tensor.numel() == 0 and place.rows == 0  # of any shape
    if not is_empty and tuple(tensor.shape) != (place.rows, *place.full_shape[1:]):
        raise ValueError(
            f"the optimizer keeps {name!r} in the shape {tuple(tensor.shape)} for {place.rows} rows of a parameter of "
            f"shape {place.full_shape}, so it cannot be put together again: pass another --opt, or leave out --fsdp"
        )
    return Piece(place.full_shape, place.start)


def _stage(by_kind: Mapping[str, Mapping[str, Held]], *, number: int, count: int, staging: Staging) -> Share:
    """Copies of one writer's tensors, by file."""
    files: dict[str, dict[str, Tensor]] = {part_name(kind, number, count): {} for kind in by_kind}
    pieces: dict[str, dict[str, Piece]] = {file: {} for file in files}
    mine = {(part_name(kind, number, count), name): held for kind in by_kind for name, held in by_kind[kind].items()}
    for (file, name), copy in staging.copy({key: held.tensor for key, held in mine.items()}).items():
        files[file][name] = copy
        piece = mine[file, name].piece
        if piece is not None:
            pieces[file][name] = piece
    return Share(files, {}, pieces)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
