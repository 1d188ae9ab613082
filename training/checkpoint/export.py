"""Checkpoints in OpenCLIP's layout: ``epoch_N.pt`` and ``epoch_latest.pt``, for its tools and from its runs.

    {"epoch": N, "name": RUN, "state_dict": ..., "optimizer": ..., ["scaler"], "global_step", "samples_seen"}

Keys carry no ``module.`` prefix (as in OpenCLIP's HEAD; 3.3.0 strips one where it finds it).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from torch import Tensor

_EPOCH_NAME = re.compile(r"epoch_(\d+)\.pt")
LATEST_NAME = "epoch_latest.pt"


class OpenClipCheckpoint(NamedTuple):
    """What an OpenCLIP training checkpoint holds."""

    epoch: int
    """Completed epochs; 0 for a file with weights only."""
    state_dict: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None


def write_epoch_file(
    directory: Path, content: Mapping[str, Any], *, epoch: int, numbered: bool, latest: bool
) -> list[Path]:
    """Writes ``epoch_N.pt`` and/or ``epoch_latest.pt``, once, each replaced atomically; returns their paths."""
    targets = [directory / f"epoch_{epoch}.pt"] * numbered + [directory / LATEST_NAME] * latest
    if not targets:
        return []
    staging = directory / f".tmp-{uuid.uuid4().hex[:8]}.pt"
    try:
        with staging.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        for target in targets[1:]:
            # A hard link costs nothing where the file system has them; elsewhere the bytes are written again.
            _replace_with_copy(staging, target)
        staging.replace(targets[0])
    finally:
        staging.unlink(missing_ok=True)
    return targets


def _replace_with_copy(source: Path, target: Path) -> None:
    link = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}.pt")
    try:
        os.link(source, link)
    except OSError:
        link.write_bytes(source.read_bytes())
    link.replace(target)


def newest_epoch_file(directory: Path) -> Path | None:
    """``epoch_latest.pt`` if there is one, else the file with the highest epoch; other names are never considered."""
    latest = directory / LATEST_NAME
    if latest.is_file():
        return latest
    matches = [match for match in (_EPOCH_NAME.fullmatch(path.name) for path in directory.glob("*.pt")) if match]
    if not matches:
        return None
    return directory / max(matches, key=lambda match: int(match[1])).string


def delete_epoch_file(directory: Path, *, epoch: int) -> None:
    """Removes ``epoch_N.pt`` (``--delete-previous-checkpoint``)."""
    (directory / f"epoch_{epoch}.pt").unlink(missing_ok=True)


def read_epoch_file(path: str) -> OpenClipCheckpoint:
    """Reads a local or remote ``.pt`` of OpenCLIP (3.3.0 or HEAD, any world size) or of ours, without unpickling code.

    Raises:
        ValueError: not a readable checkpoint.
    """
    try:
        with fsspec.open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read as a checkpoint ({error.strerror}): correct --resume.") from error
    except Exception as error:  # torch has no common type for what a damaged or foreign file makes it raise
        raise ValueError(
            f"{path!r} cannot be read as a checkpoint (it is damaged, or holds objects other than tensors and plain "
            "values, which are never unpickled): correct --resume."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path!r} holds a {type(content).__name__} and no checkpoint: correct --resume.")
    state_dict = content.get("state_dict", content)
    if any(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    return OpenClipCheckpoint(
        epoch=int(content["epoch"]) if "epoch" in content else 0,
        state_dict=state_dict,
        optimizer=content.get("optimizer"),
        scaler=content.get("scaler"),
    )
