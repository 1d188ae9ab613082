"""Where the checkpoints of a run are found by the commands: in its directory, or where it is mirrored."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from training.checkpoint.checkpointer import Checkpointer, check_tensors, read_parts
from training.checkpoint.manifest import (
    MANIFEST_NAME,
    DamagedCheckpoint,
    FileFacts,
    Manifest,
    check_content,
    check_size,
    describe,
    read_manifest,
    read_train,
)
from training.checkpoint.mirror_fetch import CHECKPOINTS, RemoteRun, files_by_step, parse_place, step_prefix
from training.checkpoint.mirror_store import open_store
from training.checkpoint.parts import parts_of
from training.checkpoint.tags import Tags


class Checkpoints(Protocol):
    """The checkpoints of a run, here or elsewhere."""

    name: str

    def steps(self) -> list[int]:
        """Ascending, whole or not."""

    def tags(self) -> Tags: ...

    def manifest(self, step: int) -> Manifest:
        """Raises DamagedCheckpoint if files are missing or have another size."""

    def describe(self, step: int, name: str) -> FileFacts:
        """Reads a file."""

    def check_tensors(self, step: int) -> None:
        """Raises DamagedCheckpoint if tensors or rows of them are in no file; what only headers tell."""

    def train(self, step: int) -> dict[str, Any]: ...

    def age_s(self, step: int) -> float | None: ...

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        """A directory with these files of a checkpoint, verified, and its manifest."""


class LocalCheckpoints:
    """A ``checkpoints`` directory."""

    def __init__(self, root: Path) -> None:
        self._checkpointer = Checkpointer(root)
        self.name = root.resolve().parent.name

    def steps(self) -> list[int]:
        return self._checkpointer.steps()

    def tags(self) -> Tags:
        return self._checkpointer.tags()

    def manifest(self, step: int) -> Manifest:
        manifest = read_manifest(self._checkpointer.path(step))
        for name, facts in manifest.files.items():
            check_size(self._checkpointer.path(step) / name, facts)
        return manifest

    def describe(self, step: int, name: str) -> FileFacts:
        return describe(self._checkpointer.path(step) / name)

    def check_tensors(self, step: int) -> None:
        check_tensors(self._checkpointer.path(step), read_manifest(self._checkpointer.path(step)))

    def train(self, step: int) -> dict[str, Any]:
        return read_train(self._checkpointer.path(step))

    def age_s(self, step: int) -> float | None:
        return time.time() - (self._checkpointer.path(step) / MANIFEST_NAME).stat().st_mtime

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        directory = self._checkpointer.path(step)
        manifest = self.manifest(step)
        for name in names:
            check_content(directory / name, expected=manifest.files[name], found=describe(directory / name))
        return directory


class RemoteCheckpoints:
    """A mirrored run."""

    def __init__(self, url: str) -> None:
        self._remote = RemoteRun(open_store(parse_place(url).run))
        self.name = self._remote.store.url.rpartition("/")[2]

    def steps(self) -> list[int]:
        return sorted(files_by_step(self._remote.listing(f"{CHECKPOINTS}/")))

    def tags(self) -> Tags:
        return self._remote.tags()

    def manifest(self, step: int) -> Manifest:
        return self._remote.manifest(step)

    def describe(self, step: int, name: str) -> FileFacts:
        return self._remote.describe(step, name)

    def check_tensors(self, step: int) -> None:
        """Nothing: a mirror takes verified checkpoints only."""

    def train(self, step: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._remote.read(f"{step_prefix(step)}train.json"))
        return content

    def age_s(self, step: int) -> float | None:
        return None

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        directory = scratch / f"step_{step:08d}"
        directory.mkdir()
        self._remote.fetch_files(step, self._remote.manifest(step), names, directory)
        return directory


def open_checkpoints(run: str) -> Checkpoints:
    """The checkpoints that RUN stands for.

    Raises:
        ValueError: there are none.
    """
    if "://" in run:
        found: Checkpoints = RemoteCheckpoints(run)
    else:
        path = Path(run)
        found = LocalCheckpoints(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if not found.steps():
        raise ValueError(f"no step checkpoints in {run!r}: pass --logs joined with --name, or URL/NAME of a mirror")
    return found


def find_damages(checkpoints: Checkpoints, step: int) -> list[str]:
    """What is wrong with a checkpoint, one line per file; reads every byte. Empty: nothing."""
    try:
        manifest = checkpoints.manifest(step)
    except DamagedCheckpoint as damage:
        return [str(damage)]
    damages = []
    for name, expected in manifest.files.items():
        try:
            found = checkpoints.describe(step, name)
        except DamagedCheckpoint as damage:
            damages.append(str(damage))
            continue
        if found != expected:
            damages.append(f"{name}: sha256 {found.sha256[:16]}..., written with {expected.sha256[:16]}...")
    if not damages:
        try:
            checkpoints.check_tensors(step)
        except DamagedCheckpoint as damage:
            damages.append(str(damage))
    return damages


def choose_step(checkpoints: Checkpoints, wanted: str) -> int:
    """The step that ``--step`` means: a number, ``best``, or ``latest``, which is whole and not suspect.

    Raises:
        ValueError: there is none.
    """
    steps, tags = checkpoints.steps(), checkpoints.tags()
    if wanted == "best":
        if tags.best is None or tags.best.step not in steps:
            raise ValueError("no checkpoint is tagged best: train with --keep-best METRIC, or pass --step N")
        return tags.best.step
    if wanted == "latest":
        return newest(checkpoints, 1)[0]
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise ValueError(f"--step {wanted}: there are {steps}, latest, and best if one is tagged")
    return int(wanted)


def newest(checkpoints: Checkpoints, count: int) -> list[int]:
    """The newest that are complete by size and not suspect, oldest first."""
    suspect = checkpoints.tags().suspect
    found: list[int] = []
    for step in reversed(checkpoints.steps()):
        if len(found) < count and step not in suspect and _sizes_match(checkpoints, step):
            found.insert(0, step)
    if len(found) < count:
        raise ValueError(f"{len(found)} checkpoints are complete and not suspect, {count} are asked for")
    return found


def _sizes_match(checkpoints: Checkpoints, step: int) -> bool:
    try:
        checkpoints.manifest(step)
    except DamagedCheckpoint as damage:
        sys.stderr.write(f"passing over step {step}: {damage}\n")
        return False
    return True


class Weights(NamedTuple):
    """What an export is made of."""

    directory: Path
    weights: Mapping[str, Tensor]
    """In the model's order; each is read when it is asked for, and not kept."""
    train: dict[str, Any]


@contextmanager
def open_weights(checkpoints: Checkpoints, step: int, *, with_optimizer: bool = False) -> Iterator[Weights]:
    """Reads a checkpoint; every file that is used is verified."""
    manifest = checkpoints.manifest(step)
    kinds = ["model"] + ["optimizer"] * with_optimizer
    names = [name for kind in kinds for name in parts_of(kind, list(manifest.files))] + ["train.json"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = checkpoints.fetch(step, names, Path(scratch))
        weights, train = read_parts(directory, manifest, "model"), read_train(directory)
        yield Weights(directory, _InOrder(weights, train.get("weights", sorted(weights))), train)


class _InOrder(Mapping[str, Tensor]):
    """Some entries of a mapping, in the given order."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        missing = [name for name in names if name not in tensors]
        if missing:
            raise DamagedCheckpoint(f"no file has {missing[0]!r}, which train.json names ({len(missing)} are missing)")
        self._tensors = tensors
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
