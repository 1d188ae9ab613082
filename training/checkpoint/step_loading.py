"""Reads a step checkpoint into all ranks: every file by one of them, verified as it is read, and sent to the others.

    rank 0:  manifest, train.json, headers -> plan -> all ranks
    rank r:  files r, r + W, ...: read tensor by tensor -> sent to all ranks -> put in place
    all:     who has found damage? -> the same answer everywhere

No rank holds more than one tensor beside the state it fills. Every function is a collective: all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
from training.checkpoint.tensor_file import Entry, TensorReader, read_entries
from training.distributed.collectives import broadcast_object, broadcast_tensor, gather_objects
from training.distributed.runtime import Runtime


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
        """Shapes by tensor name."""
        return {entry.name: entry.shape for file in self.files[kind] for entry in file.entries}


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
    """Iterates over the tensors of a plan's files on every rank, in the same order. Ask ``agree`` at the end."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._fault = ""
        self._files_read = 0

    def read(self, files: Sequence[FilePlan], *, finite: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the device), a new tensor each; what a damaged file yields is worthless.

        Args:
            finite: whether values that are no numbers are damage.
        """
        for file in files:
            reader = self._files_read % self._runtime.world_size
            self._files_read += 1
            here = self._read_here(file, finite=finite) if reader == self._runtime.rank else None
            for entry in file.entries:
                tensor = self._blank(entry) if here is None else next(here).to(self._runtime.device)
                yield entry.name, broadcast_tensor(tensor, reader)  # collective: all ranks
            if here is not None:
                next(here, None)  # the end of the file, where the hash is compared

    def agree(self) -> None:
        """Raises DamagedCheckpoint on all ranks if one of them has found damage."""
        faults = [fault for fault in gather_objects(self._fault) if fault]  # collective: all ranks
        if faults:
            raise DamagedCheckpoint(faults[0])

    def _blank(self, entry: Entry) -> Tensor:
        return torch.empty(entry.shape, dtype=entry.dtype, device=self._runtime.device)

    def _read_here(self, file: FilePlan, *, finite: bool) -> Iterator[Tensor]:
        """As many tensors as all ranks expect, whatever the file turns out to be: they must not wait for one."""
        sent = 0
        try:
            with TensorReader(file.path) as reader:
                if reader.entries != list(file.entries):
                    raise DamagedCheckpoint(f"{file.path} has another header than rank 0 has read")
                for entry, tensor in reader:
                    if finite and not is_finite(tensor):
                        self._note(f"{file.path} holds weights that are not finite ({entry.name!r})")
                    sent += 1
                    yield tensor
                check_content(file.path, expected=file.facts, found=reader.facts())
        except DamagedCheckpoint as damage:
            self._note(str(damage))
        for entry in file.entries[sent:]:
            yield torch.zeros(entry.shape, dtype=entry.dtype)

    def _note(self, fault: str) -> None:
        self._fault = self._fault or fault


def check_equal(plan: StepPlan, tensors: Mapping[str, Tensor]) -> None:
    """Whether all ranks hold the same weights of the same checkpoint now.

    Raises:
        RuntimeError: they do not.
    """
    seen = gather_objects((plan.manifest.step, plan.manifest.sha256, checksum(tensors)))  # collective: all ranks
    if len(set(seen)) > 1:
        differing = [rank for rank, facts in enumerate(seen) if facts != seen[0]]
        raise RuntimeError(
            f"After loading {plan.directory} the ranks {differing} hold other weights than rank 0: memory or network "
            "of their nodes changes bits; start again without these nodes."
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of all bits of all tensors. Sums of integers do not depend on the order of summation."""
    sums = []
    for name in sorted(tensors):
        flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        words = flat[: flat.numel() // 4 * 4].view(torch.int32)
        sums.append(words.sum(dtype=torch.int64) + flat[words.numel() * 4 :].sum(dtype=torch.int64))
    return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest() if sums else ""  # host sync


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
    return StepPlan(directory, manifest, train, files)


def _plan_files(directory: Path, manifest: Manifest, kind: str) -> list[FilePlan]:
    names = parts_of(kind, list(manifest.files))
    if not names:
        raise DamagedCheckpoint(f"{directory} has no file of the kind {kind!r}")
    return [FilePlan(directory / name, manifest.files[name], read_entries(directory / name)) for name in names]
