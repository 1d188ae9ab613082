"""Writes and finds step checkpoints: directories that exist whole or not at all.

    RUN/checkpoints/step_00000120/
        model.safetensors      weights, by OpenCLIP's parameter names
        optimizer.safetensors  PARAMETER//STATE, such as visual.proj//exp_avg
        rng.safetensors        RANK//cpu, RANK//cuda
        data.safetensors       where the data lanes stand
        train.json             counters, optimizer settings, the data stream's facts, config
        MANIFEST.json          size and sha256 of each of the above, written last

A checkpoint is written under a temporary name, flushed, and renamed: a crash leaves the previous one untouched.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from training.checkpoint.manifest import DamagedCheckpoint, fsync_directory, verify, write_manifest
from training.checkpoint.retention import steps_to_delete

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_PREFIX = ".tmp-"


class StepCheckpoint(NamedTuple):
    """The content of a step checkpoint, all ranks together; tensors on the CPU."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    train: Mapping[str, Any]
    """JSON types only."""


class Checkpointer:
    """The step checkpoints of one run. Reading and writing happen on rank 0's behalf; no collectives here."""

    def __init__(self, root: str | Path, *, keep: int = 2) -> None:
        self.root = Path(root)
        self.keep = keep

    def save(self, step: int, checkpoint: StepCheckpoint) -> Path:
        """Writes a checkpoint and removes what is past retention; returns its directory."""
        final = self.root / f"step_{step:08d}"
        if final.exists():
            # The same step again (a run that resumed at its last step): what is there is whole or gets replaced.
            try:
                verify(final)
                return final
            except DamagedCheckpoint as damage:
                logger.warning("Replacing a damaged checkpoint: %s.", damage)
                shutil.rmtree(final)
        staging = self.root / f"{_TEMPORARY_PREFIX}{step:08d}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        try:
            save_file(dict(checkpoint.model), staging / "model.safetensors")
            save_file(dict(checkpoint.optimizer), staging / "optimizer.safetensors")
            save_file(dict(checkpoint.rng), staging / "rng.safetensors")
            save_file(dict(checkpoint.data), staging / "data.safetensors")
            (staging / "train.json").write_text(json.dumps(checkpoint.train, indent=1) + "\n")
            write_manifest(staging, step=step)
            staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        fsync_directory(self.root)
        self._remove_old()
        return final

    def steps(self) -> list[int]:
        """Steps with a checkpoint directory, ascending, verified or not."""
        if not self.root.is_dir():
            return []
        matches = [_STEP_NAME.fullmatch(path.name) for path in self.root.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None if the run has none at all.

        Raises:
            DamagedCheckpoint: there are checkpoints and none of them is whole. The run must not start over in silence.
        """
        damages = []
        for step in reversed(self.steps()):
            path = self.root / f"step_{step:08d}"
            try:
                verify(path)
                return path
            except DamagedCheckpoint as damage:
                logger.warning("Skipping a damaged checkpoint: %s.", damage)
                damages.append(str(damage))
        if damages:
            raise DamagedCheckpoint(
                f"None of the {len(damages)} step checkpoints in {self.root} is whole ({damages[0]}): restore one, or "
                "move them away to start from the beginning, or pass --resume PATH."
            )
        return None

    def _remove_old(self) -> None:
        for leftover in self.root.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for step in steps_to_delete(self.steps(), keep=self.keep):
            doomed = self.root / f"step_{step:08d}"
            # Renamed first: a crash half way through deleting must not leave something that looks like a checkpoint.
            trash = doomed.rename(self.root / f"{_TEMPORARY_PREFIX}trash-{step:08d}-{uuid.uuid4().hex[:8]}")
            shutil.rmtree(trash, ignore_errors=True)


def read_step_checkpoint(directory: Path) -> StepCheckpoint:
    """Reads a step checkpoint to the CPU after verifying it.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
    """
    verify(directory)
    return StepCheckpoint(
        model=load_file(directory / "model.safetensors"),
        optimizer=load_file(directory / "optimizer.safetensors"),
        rng=load_file(directory / "rng.safetensors"),
        data=load_file(directory / "data.safetensors"),
        train=json.loads((directory / "train.json").read_text()),
    )
