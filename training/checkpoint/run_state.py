"""Gathers everything a run needs to go on from where it is, and puts it back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import Clip
from models.weights import load_weights
from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint, read_step_checkpoint
from training.checkpoint.export import newest_epoch_file, read_epoch_file
from training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from training.data.lanes import mix
from training.data.loader import TrainLoader
from training.data.position import read_position
from training.distributed.collectives import gather_objects
from training.distributed.runtime import Runtime
from training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that have state; ``model`` is the plain module, not a data-parallel wrapper."""

    model: Clip
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loader: TrainLoader
    state: TrainState


def capture(parts: RunParts, *, runtime: Runtime, epoch: int, config: Mapping[str, Any]) -> StepCheckpoint | None:
    """The whole state after the current step: on rank 0; None elsewhere. Collective: all ranks."""
    positions = gather_objects(parts.loader.position())  # collective: all ranks
    rng = gather_objects(_rng_state(runtime.device))  # collective: all ranks
    if not runtime.is_main:
        return None
    optimizer_tensors, optimizer_scalars = pack_optimizer(parts.optimizer, parts.model)
    stream = parts.loader.merge(positions)
    return StepCheckpoint(
        model={name: tensor.detach().cpu().contiguous() for name, tensor in parts.model.state_dict().items()},
        optimizer=optimizer_tensors,
        rng={f"{rank}//{key}": value for rank, states in enumerate(rng) for key, value in states.items()},
        data=stream.tensors(),
        train={
            "step": parts.state.step,
            "epoch": epoch,
            "samples_seen": parts.state.samples_seen,
            "world_size": runtime.world_size,
            "optimizer": optimizer_scalars,
            "scaler": parts.scaler.state_dict() if parts.scaler else None,
            "data": stream.facts(),
            "config": config,
            "versions": {name: version(name) for name in ("torch", "timm", "open_clip_torch")},
        },
    )


def epoch_file_content(parts: RunParts, *, epoch: int, name: str) -> dict[str, Any]:
    """What ``epoch_N.pt`` holds: OpenCLIP's keys. On rank 0."""
    content: dict[str, Any] = {
        "epoch": epoch,
        "name": name,
        "state_dict": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "global_step": parts.state.step,
        "samples_seen": parts.state.samples_seen,
    }
    if parts.scaler is not None:
        content["scaler"] = parts.scaler.state_dict()
    return content


def find_resume_path(resume: str, *, checkpoints: Path | None) -> str | None:
    """What ``--resume`` stands for; None if it is 'latest' and there is nothing yet. On rank 0.

    'latest' is the newest whole step checkpoint in ``checkpoints``, else the newest ``epoch_N.pt`` (a run that
    OpenCLIP began).

    Raises:
        ValueError: not a checkpoint. DamagedCheckpoint: there are step checkpoints, and none is whole.
    """
    if resume == "latest":
        if checkpoints is None:
            raise ValueError("--resume latest with --logs none: there is no run directory to look in; pass a path.")
        found = Checkpointer(checkpoints).newest() or newest_epoch_file(checkpoints)
        return None if found is None else str(found)
    if "://" in resume or resume.endswith(".pt"):
        return resume
    path = Path(resume)
    nested = Checkpointer(path / "checkpoints").newest()
    if nested is not None:
        return str(nested)
    if not (path / "train.json").is_file():
        raise ValueError(f"{resume!r} is no checkpoint (a step_N directory, a run, or a .pt file): correct --resume.")
    return resume


def restore(path: str, parts: RunParts, *, runtime: Runtime, steps_per_epoch: int, samples_per_step: int) -> None:
    """Loads a step checkpoint, or a ``.pt`` in OpenCLIP's layout (which starts at the beginning of an epoch).

    Raises:
        ValueError: another architecture, other trained parameters, or another data stream.
        DamagedCheckpoint: the directory is not what was written.
    """
    if path.endswith(".pt"):
        _restore_epoch_file(path, parts, steps_per_epoch=steps_per_epoch, samples_per_step=samples_per_step)
    else:
        _restore_step(Path(path), parts, runtime=runtime)
    logger.info("Resumed from %s at step %d (%d samples seen).", path, parts.state.step, parts.state.samples_seen)


def read_weights(path: str) -> tuple[int, dict[str, Tensor]]:
    """(completed epochs as far as the checkpoint tells, weights) of a step checkpoint or a ``.pt`` file."""
    if path.endswith(".pt"):
        checkpoint = read_epoch_file(path)
        return checkpoint.epoch, dict(checkpoint.state_dict)
    step = read_step_checkpoint(Path(path))
    return int(step.train["epoch"]), dict(step.model)


def _restore_step(path: Path, parts: RunParts, *, runtime: Runtime) -> None:
    checkpoint = read_step_checkpoint(path)
    train = checkpoint.train
    load_weights(parts.model, dict(checkpoint.model))
    parts.loader.load_position(read_position(checkpoint.data, train["data"]))
    unpack_optimizer(parts.optimizer, parts.model, checkpoint.optimizer, train["optimizer"])
    if parts.scaler is not None and train["scaler"] is not None:
        parts.scaler.load_state_dict(train["scaler"])
    if train["world_size"] == runtime.world_size:
        _set_rng_state(checkpoint.rng, rank=runtime.rank, device=runtime.device)
    else:
        _seed_rng(int(train["step"]), rank=runtime.rank)
    parts.state.step = int(train["step"])
    parts.state.samples_seen = int(train["samples_seen"])


def _restore_epoch_file(path: str, parts: RunParts, *, steps_per_epoch: int, samples_per_step: int) -> None:
    checkpoint = read_epoch_file(path)
    load_weights(parts.model, dict(checkpoint.state_dict))
    if checkpoint.optimizer is not None:
        _load_numbered_optimizer(parts.optimizer, checkpoint.optimizer, path=path)
    else:
        logger.warning("%s holds weights only: the optimizer starts afresh.", path)
    if parts.scaler is not None and checkpoint.scaler is not None:
        parts.scaler.load_state_dict(dict(checkpoint.scaler))
    parts.loader.start_at_epoch(checkpoint.epoch)
    parts.state.step = checkpoint.epoch * steps_per_epoch
    parts.state.samples_seen = parts.state.step * samples_per_step


def _load_numbered_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *, path: str) -> None:
    """OpenCLIP numbers parameters by group; the state is taken over, settings stay as configured now."""
    current = optimizer.state_dict()
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    current_sizes = [len(group["params"]) for group in current["param_groups"]]
    if saved_sizes != current_sizes:
        raise ValueError(
            f"{path!r} has optimizer groups of {saved_sizes} parameters, this run {current_sizes} (OpenCLIP's 3.3.0 "
            "and later versions group them differently): resume with the settings it was trained with, or give it to "
            "--pretrained to start from its weights."
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": current["param_groups"]})


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_state(states: Mapping[str, Tensor], *, rank: int, device: torch.device) -> None:
    torch.set_rng_state(states[f"{rank}//cpu"])
    if device.type == "cuda" and f"{rank}//cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}//cuda"], device)


def _seed_rng(step: int, *, rank: int) -> None:
    """In another world no rank's generator has a past: each begins with one of its own."""
    torch.manual_seed(mix(step, rank) >> 1)
