"""Ways in which a checkpoint on the disk goes bad."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def _truncate(directory: Path) -> None:
    path = _largest(directory)
    os.truncate(path, path.stat().st_size // 2)


def _flip_bit(directory: Path) -> None:
    path = _largest(directory)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def _zero_hole(directory: Path) -> None:
    """As a file system leaves it that was not flushed before the power went: at the end, within the values."""
    path = _largest(directory)
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


def _empty(directory: Path) -> None:
    os.truncate(_largest(directory), 0)


def _remove_file(directory: Path) -> None:
    _largest(directory).unlink()


def _bad_json(directory: Path) -> None:
    (directory / "train.json").write_text("{")


def _no_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").unlink()


def _bad_manifest(directory: Path) -> None:
    (directory / "MANIFEST.json").write_text("[1, 2]")


def _other_format(directory: Path) -> None:
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    (directory / "MANIFEST.json").write_text(json.dumps(manifest | {"format": 99}))


def _mixed(directory: Path) -> None:
    """A file of the checkpoint before: whole in itself."""
    older = sorted(path for path in directory.parent.glob("step_*") if path < directory)[-1]
    shutil.copy(_largest(older), _largest(directory))


def _empty_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "bit flipped": _flip_bit,
    "zeros": _zero_hole,
    "empty file": _empty,
    "file missing": _remove_file,
    "bad train.json": _bad_json,
    "manifest missing": _no_manifest,
    "bad manifest": _bad_manifest,
    "format of the future": _other_format,
    "file of another step": _mixed,
    "empty directory": _empty_directory,
}


def _largest(directory: Path) -> Path:
    """The weights, or their first part."""
    return max(directory.glob("model*"), key=lambda path: path.stat().st_size)
