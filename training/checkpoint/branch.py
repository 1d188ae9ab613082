"""Finds the checkpoint that ``--branch-from RUN@STEP`` names: where a child run starts from its parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import Manifest, verify


class BranchPoint(NamedTuple):
    """A verified checkpoint of another run."""

    directory: Path
    manifest: Manifest

    def as_json(self) -> dict[str, Any]:
        """What the child's history says of its parent."""
        run = self.directory.resolve().parent.parent
        return {"run": str(run), "step": self.manifest.step, "manifest_sha256": self.manifest.sha256}


def find_branch_point(spec: str, *, logs: Path) -> BranchPoint:
    """The checkpoint that ``RUN@STEP`` or ``RUN@latest`` names, every byte of it verified.

    Args:
        spec: RUN is a run's directory, or its name in ``logs``.

    Raises:
        ValueError: no such run, or it has no such checkpoint. DamagedCheckpoint: it has, but it is not whole.
    """
    name, _, step = spec.rpartition("@")
    checkpointer = Checkpointer(_find_run(name, logs) / "checkpoints")
    if step == "latest":
        newest = checkpointer.newest()
        if newest is None:
            raise ValueError(f"--branch-from {spec}: {checkpointer.root} has no step checkpoint.")
        return BranchPoint(newest, verify(newest))
    if not step.isdecimal() or int(step) not in checkpointer.steps():
        steps = ", ".join(map(str, checkpointer.steps())) or "none"
        raise ValueError(f"--branch-from {spec}: no checkpoint of this step in {checkpointer.root} (there: {steps}).")
    directory = checkpointer.path(int(step))
    return BranchPoint(directory, verify(directory))


def has_own_checkpoint(checkpoints: Path | None) -> bool:
    """Whether a run has been saved itself: then it goes on from there, and no longer from its parent."""
    return checkpoints is not None and bool(Checkpointer(checkpoints).steps())


def _find_run(name: str, logs: Path) -> Path:
    places = [Path(name), logs / name] if name else []
    for place in places:
        if (place / "checkpoints").is_dir():
            return place
    looked = " nor ".join(str(place / "checkpoints") for place in places) or "nothing"
    raise ValueError(f"--branch-from {name}@...: there is neither {looked}; give a run's directory or its name.")
