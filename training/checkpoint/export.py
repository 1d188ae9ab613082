"""Checkpoints in OpenCLIP's layout: ``epoch_N.pt`` and ``epoch_latest.pt``, for its tools and from its runs.

    {"epoch": N, "name": RUN, "state_dict": ..., "optimizer": ..., ["scaler"], "global_step", "samples_seen"}

Keys carry no ``module.`` prefix (as in OpenCLIP's HEAD; 3.3.0 strips one where it finds it). They are made from a step
checkpoint on the disk, so that neither the training nor its memory takes part.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from torch import Tensor

from training.checkpoint.checkpointer import damaged_name, new_token, read_parts, temporary_name
from training.checkpoint.manifest import Manifest, fsync, read_manifest, read_train
from training.checkpoint.optimizer_state import split_names, unpack_groups
from training.checkpoint.parts import part_name, parts_of
from training.checkpoint.pieces import join_files
from training.checkpoint.tensor_file import map_tensors

logger = logging.getLogger(__name__)

_EPOCH_NAME = re.compile(r"epoch_(\d+)\.pt")
LATEST_NAME = "epoch_latest.pt"


def epoch_content(
    step_directory: Path,
    *,
    name: str,
    epoch: int | None = None,
    with_optimizer: bool = True,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """What ``epoch_N.pt`` holds, out of a step checkpoint: OpenCLIP's keys. Tensors stay on the disk until looked at.

    Args:
        name: the run's.
        epoch: completed epochs, if the checkpoint was saved before that was counted.
        scratch: a directory for files of whole tensors, made of those that lie in pieces; to be deleted when the
            content is no longer needed. Without it whole tensors are made in memory.

    Raises:
        DamagedCheckpoint: a file that cannot be read. It is not verified: the caller has done that.
        ValueError: the directory was written by a version that did not save the optimizer's settings.
    """
    manifest, train = read_manifest(step_directory), read_train(step_directory)
    weights = _read_whole(step_directory, manifest, "model", scratch)
    content: dict[str, Any] = {
        "epoch": int(train["epoch"]) if epoch is None else epoch,
        "name": name,
        "state_dict": {key: weights[key] for key in train.get("weights", sorted(weights))},
    }
    if with_optimizer:
        if "param_groups" not in train:
            raise ValueError(
                f"{step_directory} was written by an earlier version, which did not save the optimizer's settings: "
                "only its weights can be exported."
            )
        tensors = _read_whole(step_directory, manifest, "optimizer", scratch)
        content["optimizer"] = _numbered_optimizer(tensors, train)
    content |= {"global_step": int(train["step"]), "samples_seen": int(train["samples_seen"])}
    if train.get("scaler") is not None:
        content["scaler"] = train["scaler"]
    return content


def export_epoch_file(step_directory: Path, target: Path, *, name: str, with_optimizer: bool = True) -> None:
    """Writes a step checkpoint as one ``.pt`` file in OpenCLIP's layout, replacing what is there at once."""
    _write_file(target, epoch_content(step_directory, name=name, with_optimizer=with_optimizer))


def _read_whole(directory: Path, manifest: Manifest, kind: str, scratch: Path | None) -> Mapping[str, Tensor]:
    if scratch is None or manifest.shard_ranks == 1:
        return read_parts(directory, manifest, kind)
    joined = scratch / part_name(kind, 0, 1)
    join_files([directory / file for file in parts_of(kind, list(manifest.files))], joined)
    return map_tensors(joined)


def _numbered_optimizer(tensors: Mapping[str, Tensor], train: Mapping[str, Any]) -> dict[str, Any]:
    """As ``Optimizer.state_dict`` numbers it."""
    groups = unpack_groups(train["param_groups"])
    names = [name for group in train["param_groups"] for name in group["names"]]
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, key, value in split_names(tensors, train["optimizer"]):
        values[name][key] = value
    state = {number: values[name] for number, name in enumerate(names) if values[name]}
    return {"state": state, "param_groups": groups}


def _is_archive(path: str) -> bool:
    """What torch.save has written since 2020, on a disk of this machine: such a file can be mapped."""
    return "://" not in path and zipfile.is_zipfile(path)


def _load_mapped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:  # reads every byte
            raise zipfile.BadZipFile(f"the check sum of {damaged} is another one")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_all(path: str) -> Any:
    with fsspec.open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _write_file(target: Path, content: Mapping[str, Any]) -> None:
    staging = target.with_name(temporary_name(target.stem, generation=0, token=new_token()) + ".pt")
    try:
        with staging.open("xb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    fsync(target.parent)


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
    _write_file(targets[0], content)
    for target in targets[1:]:
        # A hard link costs nothing where the file system has them; elsewhere the bytes are written again.
        _replace_with_copy(targets[0], target)
    return targets


def _replace_with_copy(source: Path, target: Path) -> None:
    link = target.with_name(temporary_name(target.stem, generation=0, token=new_token()) + ".pt")
    try:
        try:
            os.link(source, link)
        except OSError:
            shutil.copyfile(source, link)
            fsync(link)
        link.replace(target)
    finally:
        link.unlink(missing_ok=True)


def newest_epoch_file(directory: Path) -> Path | None:
    """``epoch_latest.pt`` if there is one, else the file with the highest epoch; other names are never considered."""
    return next(iter(_epoch_files(directory)), None)


def newest_readable_epoch_file(directory: Path) -> Path | None:
    """The same of those that can be read. The others are renamed: they are not found any more, and not lost."""
    for path in _epoch_files(directory):
        try:
            read_epoch_file(str(path))
            return path
        except ValueError as error:
            logger.warning("%s It is kept as %s.", error, path.rename(damaged_name(path)))
    return None


def saved_epoch(path: Path) -> int | None:
    """Completed epochs of an epoch file; None if there is none that can be read. Tensors stay on the disk."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except Exception:  # torch has no common type for what a damaged or foreign file makes it raise
        return None


def _epoch_files(directory: Path) -> list[Path]:
    matches = [match for match in (_EPOCH_NAME.fullmatch(path.name) for path in directory.glob("*.pt")) if match]
    numbered = [directory / match.string for match in sorted(matches, key=lambda match: int(match[1]), reverse=True)]
    latest = directory / LATEST_NAME
    return [latest] * latest.is_file() + numbered


def delete_epoch_file(directory: Path, *, epoch: int) -> None:
    """Removes ``epoch_N.pt`` (``--delete-previous-checkpoint``)."""
    (directory / f"epoch_{epoch}.pt").unlink(missing_ok=True)


def read_epoch_file(path: str) -> OpenClipCheckpoint:
    """Reads a local or remote ``.pt`` of OpenCLIP (3.3.0 or HEAD, any world size) or of ours, without unpickling code.

    Tensors of a local file take memory as they are looked at.

    Raises:
        ValueError: not a readable checkpoint, or not what was written: torch itself compares no check sums.
    """
    try:
        content = _load_mapped(Path(path)) if _is_archive(path) else _load_all(path)
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
