"""Tells a whole checkpoint from a damaged one: MANIFEST.json holds size and sha256 of every file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST_NAME = "MANIFEST.json"
_CHUNK_BYTES = 1 << 20


class DamagedCheckpoint(RuntimeError):
    """A checkpoint directory that is not what was written; the message says which file differs, and how."""


def write_manifest(directory: Path, *, step: int) -> None:
    """Writes MANIFEST.json over all files of ``directory`` and flushes everything to disk."""
    files = {path.name: _describe(path) for path in sorted(directory.iterdir())}
    for name in files:
        _fsync(directory / name)
    manifest = directory / MANIFEST_NAME
    manifest.write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=1) + "\n")
    _fsync(manifest)
    _fsync(directory)


def verify(directory: Path) -> None:
    """Returns if every file is exactly as written.

    Raises:
        DamagedCheckpoint: no manifest, or a file that is missing, of another size or of another content.
    """
    try:
        files = json.loads((directory / MANIFEST_NAME).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{directory} has no readable {MANIFEST_NAME} ({error})") from None
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        found = _describe(path)
        if found != expected:
            raise DamagedCheckpoint(f"{path} was written as {expected} and now reads as {found}")


def fsync_directory(directory: Path) -> None:
    """Makes renames within ``directory`` durable."""
    _fsync(directory)


def _describe(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
