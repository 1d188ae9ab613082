"""Tells a whole checkpoint from a damaged one: MANIFEST.json holds size and sha256 of every file beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.resilience.exit_codes import DO_NOT_REQUEUE

MANIFEST_NAME = "MANIFEST.json"
TRAIN_NAME = "train.json"
FORMAT = 2
FORMAT_IN_PIECES = 3
"""Of a state of which several ranks hold some rows each: versions that know of whole tensors only must not read it."""
_READABLE_FORMATS = (1, 2, 3)
_CHUNK_BYTES = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(RuntimeError):
    """A checkpoint directory that is not what was written; the message says which file differs, and how."""

    exit_code = DO_NOT_REQUEUE
    """What a job ends with that has no other checkpoint: starting again would find the same files."""


class FileFacts(NamedTuple):
    """What is known of a file that was written."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """The content of MANIFEST.json."""

    step: int
    files: Mapping[str, FileFacts]
    generation: int
    """The start of the run that wrote it (see the lease); 0 in format 1."""
    world_size: int
    """Ranks of the job that wrote it; 0 in format 1, which does not say."""
    sha256: str
    """Of MANIFEST.json as a file: two checkpoints with the same are the same."""
    shard_ranks: int = 1
    """Ranks that held one copy of the state together (FSDP); 1 where each rank held all of it."""


def write_manifest(
    directory: Path,
    files: Mapping[str, FileFacts],
    *,
    step: int,
    generation: int = 0,
    world_size: int = 1,
    shard_ranks: int = 1,
) -> None:
    """Writes MANIFEST.json over files that are on disk already, and flushes it and the directory."""
    content: dict[str, Any] = {
        "format": FORMAT if shard_ranks == 1 else FORMAT_IN_PIECES,
        "step": step,
        "generation": generation,
        "world_size": world_size,
        **({} if shard_ranks == 1 else {"shard_ranks": shard_ranks}),
        "files": {name: files[name]._asdict() for name in sorted(files)},
    }
    content["sha256"] = _own_sha256(content)
    manifest = directory / MANIFEST_NAME
    manifest.write_text(json.dumps(content, indent=1) + "\n")
    fsync(manifest)
    fsync(directory)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, without a look at the files.

    Raises:
        DamagedCheckpoint: there is none, it is not one, or it is that of another step than the directory's.
    """
    try:
        data = (directory / MANIFEST_NAME).read_bytes()
        manifest = _parse(json.loads(data), sha256=hashlib.sha256(data).hexdigest())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{directory} has no readable {MANIFEST_NAME} ({error!r})") from None
    match = _STEP_NAME.fullmatch(directory.name)
    if match is not None and int(match[1]) != manifest.step:
        raise DamagedCheckpoint(f"{directory} holds the checkpoint of step {manifest.step}, by its {MANIFEST_NAME}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Reads every byte; returns the manifest if every file is exactly as written.

    Raises:
        DamagedCheckpoint: no manifest, a file that is missing, of another size or of another content, or two files
            that speak of different steps.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        check_size(directory / name, expected)
        check_content(directory / name, expected=expected, found=describe(directory / name))
    if TRAIN_NAME in manifest.files:
        check_step(directory, manifest, read_train(directory))
    return manifest


def read_train(directory: Path) -> dict[str, Any]:
    """``train.json`` of a checkpoint.

    Raises:
        DamagedCheckpoint: there is none, or it is not one.
    """
    try:
        content = json.loads((directory / TRAIN_NAME).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{directory / TRAIN_NAME} cannot be read ({error!r})") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{directory / TRAIN_NAME} cannot be read (it holds no object)")
    return content


def check_step(directory: Path, manifest: Manifest, train: Mapping[str, Any]) -> None:
    """Raises DamagedCheckpoint if a ``train.json`` speaks of another step than the manifest beside it."""
    if train.get("step", manifest.step) != manifest.step:
        raise DamagedCheckpoint(
            f"{directory / TRAIN_NAME} is of step {train['step']}, the {MANIFEST_NAME} beside it of {manifest.step}"
        )


def check_size(path: Path, expected: FileFacts) -> None:
    """The part of verifying that reads nothing.

    Raises:
        DamagedCheckpoint: the file is missing or of another size.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{path} is missing ({error.strerror})") from None
    if size != expected.size:
        raise DamagedCheckpoint(f"{path} was written with {expected.size} bytes and now has {size}")


def check_content(path: Path, *, expected: FileFacts, found: FileFacts) -> None:
    """Raises DamagedCheckpoint if what was read differs from what was written."""
    if found != expected:
        raise DamagedCheckpoint(f"{path} was written as {_show(expected)} and now reads as {_show(found)}")


def describe(path: Path) -> FileFacts:
    """Size and sha256 of a file.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
    return FileFacts(size, digest.hexdigest())


def fsync(path: Path) -> None:
    """Makes a file's content, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(content: Any, *, sha256: str) -> Manifest:
    if content["format"] not in _READABLE_FORMATS:
        raise ValueError(f"format {content['format']}: this version reads {_READABLE_FORMATS}")
    if content.get("sha256", own := _own_sha256(content)) != own:
        raise ValueError("its content is not what was written")
    files = {name: FileFacts(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a file beside the manifest")
    return Manifest(
        int(content["step"]),
        files,
        int(content.get("generation", 0)),
        int(content.get("world_size", 0)),
        sha256,
        int(content.get("shard_ranks", 1)),
    )


def _own_sha256(content: Mapping[str, Any]) -> str:
    """Of all that a manifest says besides; those of earlier versions do not carry it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _show(facts: FileFacts) -> str:
    return f"{facts.size} bytes with sha256 {facts.sha256[:16]}..."
