"""Reads a step checkpoint into all ranks: every file by one of them, verified as it is read, and sent to the others.

    rank 0:  manifest, train.json, headers -> plan -> all ranks
    rank r:  files r, r + W, ...: read block by block -> sent to all ranks -> each takes the rows that it holds
    all:     who has found damage? -> the same answer everywhere
    all:     do the ranks hold what was read? -> sums over all bits, from the files and from the memory of the ranks

A block is some tensors of a file that lie one after another, at most 4 MiB of them, or one larger tensor: no rank holds
more than that beside the state it fills. Every function is a collective: all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.checkpoint.checkpointer import is_finite
from training.checkpoint.manifest import (
    TRAIN_NAME,
    DamagedCheckpoint,
    FileFacts,
    Manifest,
    check_content,
    check_size,
    check_step,
    describe,
    read_manifest,
    read_train,
)
from training.checkpoint.parts import parts_of
from training.checkpoint.pieces import find_pieces
from training.checkpoint.tensor_file import Entry, TensorReader, read_entries, view_of
from training.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum,
    broadcast_object,
    broadcast_tensor,
    gather_objects,
)
from training.distributed.runtime import Runtime
from training.distributed.sharding import ShardGroup

BLOCK_BYTES = 4 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of an element."""


class FilePlan(NamedTuple):
    """One file, and what lies in it."""

    path: Path
    facts: FileFacts
    entries: Sequence[Entry]


class StepPlan(NamedTuple):
    """What is to be read of a checkpoint: the same on all ranks."""

    directory: Path
    manifest: Manifest
    train: Mapping[str, Any]
    files: Mapping[str, Sequence[FilePlan]]
    """By kind: model, optimizer, rng, data."""

    def names(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of whole tensors by name."""
        return {entry.name: entry.full_shape for file in self.files[kind] for entry in file.entries}


def agree_on_plan(directory: Path, *, rank: int) -> StepPlan:
    """What rank 0 finds in a directory; all other files are the business of ``read_tensors``.

    Raises:
        DamagedCheckpoint: on all ranks, for what rank 0 has seen.
    """
    plan: StepPlan | str = ""
    if rank == 0:
        try:
            plan = _make_plan(directory)
        except DamagedCheckpoint as damage:
            plan = str(damage)
    plan = broadcast_object(plan)  # collective: all ranks
    if isinstance(plan, str):
        raise DamagedCheckpoint(plan)
    return plan


class TensorStream:
    """Brings the tensors of a plan's files to every rank, in the same order. Ask ``agree`` at the end."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._fault = ""
        self._files_read = 0
        self.bit_sums: dict[str, Tensor] = {}
        """``bit_sum`` of what this rank has read itself, by tensor."""
        self.dtypes: dict[str, torch.dtype] = {}
        """Of all tensors that were read, on all ranks."""

    @property
    def device(self) -> torch.device:
        """Where tensors come to."""
        return self._runtime.device

    def read(self, files: Sequence[FilePlan], take: Callable[[Entry, Tensor], None], *, finite: bool = False) -> None:
        """Reads all of them; what a damaged file gives is worthless.

        Args:
            take: gets every tensor, or some rows of one, on the device, and copies what it wants to keep.
            finite: whether values that are no numbers are damage.
        """
        for file in files:
            reader = self._files_read % self._runtime.world_size
            self._files_read += 1
            here = self._read_here(file, finite=finite) if reader == self._runtime.rank else None
            for entries in blocks_of(file.entries):
                block = self._blank(entries) if here is None else next(here).to(self._runtime.device)
                broadcast_tensor(block, reader)  # collective: all ranks
                for entry in entries:
                    self.dtypes[entry.name] = entry.dtype
                    take(entry, view_of(block, entry, start=entries[0].offset))
                del block  # before there is another
            if here is not None:
                next(here, None)  # the end of the file, where the hash is compared

    def agree(self) -> None:
        """Raises DamagedCheckpoint on all ranks if one of them has found damage."""
        faults = [fault for fault in gather_objects(self._fault) if fault]  # collective: all ranks
        if faults:
            raise DamagedCheckpoint(faults[0])

    def _blank(self, entries: Sequence[Entry]) -> Tensor:
        size = sum(entry.nbytes for entry in entries)
        return torch.empty(size, dtype=torch.uint8, device=self._runtime.device)

    def _read_here(self, file: FilePlan, *, finite: bool) -> Iterator[Tensor]:
        """As many blocks as all ranks expect, whatever the file turns out to be: they must not wait for one."""
        sent = 0
        blocks = list(blocks_of(file.entries))
        try:
            with TensorReader(file.path) as reader:
                if reader.entries != list(file.entries):
                    raise DamagedCheckpoint(f"{file.path} has another header than rank 0 has read")
                for entries in blocks:
                    block = reader.read_block(entries)
                    self._look_at(block, entries, path=file.path if finite else None)
                    sent += 1
                    yield block
                    del block
                check_content(file.path, expected=file.facts, found=reader.facts())
        except DamagedCheckpoint as damage:
            self._note(str(damage))
        for entries in blocks[sent:]:
            yield torch.zeros(sum(entry.nbytes for entry in entries), dtype=torch.uint8)

    def _look_at(self, block: Tensor, entries: Sequence[Entry], *, path: Path | None) -> None:
        """Before it is sent, in the memory into which it was read."""
        for entry in entries:
            tensor = view_of(block, entry, start=entries[0].offset)
            if path is not None and not is_finite(tensor):
                self._note(f"{path} holds weights that are not finite ({entry.name!r})")
            known = self.bit_sums.get(entry.name, torch.zeros((), dtype=torch.int64))
            self.bit_sums[entry.name] = known + bit_sum(tensor)

    def _note(self, fault: str) -> None:
        self._fault = self._fault or fault


def blocks_of(entries: Sequence[Entry], *, nbytes: int = BLOCK_BYTES) -> Iterator[list[Entry]]:
    """Entries that are read and sent together: ``nbytes`` of them, or a single one that is larger. Pure."""
    block: list[Entry] = []
    for entry in entries:
        size = entry.offset + entry.nbytes - block[0].offset if block else 0
        # Files of other writers may order tensors so that one does not lie at a multiple of its type's size.
        if block and (size > nbytes or (entry.offset - block[0].offset) % entry.dtype.itemsize):
            yield block
            block = []
        block.append(entry)
    if block:
        yield block


def check_equal(
    plan: StepPlan, tensors: Mapping[str, Tensor], *, stream: TensorStream, pieces: Collection[str], group: ShardGroup
) -> None:
    """Whether the ranks hold now what was read: every copy of the state, and every bit of it.

    Tensors that are of another type here than in the files cannot be compared with those, but with rank 0's copy.

    Args:
        tensors: what this rank holds, by name; the same names on all ranks.
        pieces: those of which it holds some rows; the ranks of a copy hold all rows once.
        group: this rank's place.

    Raises:
        RuntimeError: they do not.
    """
    names = sorted(tensors)
    device = stream.device
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    own = torch.stack([bit_sum(tensors[name]).to(device) for name in names]) if names else nothing
    read = (
        torch.stack([stream.bit_sums.get(name, own.new_zeros(())).to(device) for name in names]) if names else nothing
    )
    read = all_reduce_sum(read)  # collective: all ranks
    sums = all_gather_rows(own[None])  # collective: all ranks; [W, T]
    copies = gather_objects(group.replica)  # collective: all ranks
    is_piece = torch.tensor([name in pieces for name in names], dtype=torch.bool, device=device)
    totals = {copy: sums[[other == copy for other in copies]].sum(0) for copy in set(copies)}
    held = torch.stack([torch.where(is_piece, totals[copy], sums[rank]) for rank, copy in enumerate(copies)])  # [W, T]
    is_same_type = [stream.dtypes.get(name) == tensors[name].dtype for name in names]
    expected = torch.where(torch.tensor(is_same_type, dtype=torch.bool, device=device), read, held[0])
    wrong = (held != expected).nonzero().tolist()  # host sync
    if wrong:
        ranks = sorted({rank for rank, _ in wrong})
        together = f" (each {group.size} in a row share a copy)" if group.size > 1 else ""
        raise RuntimeError(
            f"After loading {plan.directory} the ranks {ranks}{together} hold other bits than its files, first in "
            f"{names[wrong[0][1]]!r}: memory or network of their nodes changes bits; start again without these nodes."
        )


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of all elements' bits, read as integers: 0-D, int64. The same however a tensor is cut and added up."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def _make_plan(directory: Path) -> StepPlan:
    manifest = read_manifest(directory)
    for name, facts in manifest.files.items():
        check_size(directory / name, facts)
    if TRAIN_NAME not in manifest.files:
        raise DamagedCheckpoint(f"{directory} has no {TRAIN_NAME}")
    facts = manifest.files[TRAIN_NAME]
    check_content(directory / TRAIN_NAME, expected=facts, found=describe(directory / TRAIN_NAME))
    train = read_train(directory)
    check_step(directory, manifest, train)
    files = {kind: _plan_files(directory, manifest, kind) for kind in ("model", "optimizer", "rng", "data")}
    for kind in files:
        find_pieces({file.path: file.entries for file in files[kind]})  # raises if rows are missing
    return StepPlan(directory, manifest, train, files)


def _plan_files(directory: Path, manifest: Manifest, kind: str) -> list[FilePlan]:
    names = parts_of(kind, list(manifest.files))
    if not names:
        raise DamagedCheckpoint(f"{directory} has no file of the kind {kind!r}")
    return [FilePlan(directory / name, manifest.files[name], read_entries(directory / name)) for name in names]
