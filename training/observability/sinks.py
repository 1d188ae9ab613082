"""Where metrics go: TensorBoard, a JSON-lines file, Weights & Biases. A sink takes a step and numbers by name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from training.config import LoggingConfig


class MetricSink(Protocol):
    """Takes metrics of one step under their full names (``train/loss``)."""

    def write(self, step: int, metrics: Mapping[str, float], *, epoch: int | None = None) -> None:
        """Records the metrics, visible to readers soon after. ``epoch`` is given for evaluations."""

    def close(self) -> None:
        """Flushes; nothing may be written afterwards."""


class TensorBoardSink:
    """TensorBoard scalars. What a crashed part of the run wrote after ``first_step`` disappears from the plots."""

    def __init__(self, directory: Path, *, first_step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=first_step or None, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, float], *, epoch: int | None = None) -> None:
        """One scalar per metric; evaluations stand at their epoch, as in OpenCLIP."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step if epoch is None else epoch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class JsonLinesSink:
    """``metrics.jsonl``: one object per log point, ``step`` first. Steps from ``first_step`` on are dropped on opening.

    Steps count from 0, so they are the ones that this run is about to take; an evaluation stands after its step.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] < first_step + ("epoch" in line)]
        staging = path.with_suffix(".tmp")
        staging.write_text("".join(json.dumps(line) + "\n" for line in kept))
        staging.replace(path)
        self._file = path.open("ab", buffering=0)
        self._cut = False
        """The last line may not have been written whole."""

    def write(self, step: int, metrics: Mapping[str, float], *, epoch: int | None = None) -> None:
        """One line."""
        place = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        line = (json.dumps({**place, **metrics}) + "\n").encode()
        # Unbuffered: what a full disk does not take must not come again with the next line, or at the end.
        cut, self._cut = self._cut, True
        if self._file.write(b"\n" * cut + line) != cut + len(line):
            raise OSError(errno.ENOSPC, "a line was cut", self._file.name)
        self._cut = False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbSink:
    """Weights & Biases; a resumed run goes on under the same id, which is kept beside the logs."""

    def __init__(self, directory: Path, *, config: LoggingConfig, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("--report-to wandb needs the package wandb: pip install 'clipyard[wandb]'.") from None
        id_file = directory / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=config.wandb_project_name,
            name=name,
            notes=config.wandb_notes,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )
        self._newest = 0

    def write(self, step: int, metrics: Mapping[str, float], *, epoch: int | None = None) -> None:
        """One history row; ``step`` is also a metric of its own, as in OpenCLIP."""
        place = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        # Its steps must not go back, and events are known some steps after theirs.
        self._newest = max(self._newest, step)
        self._run.log({**metrics, **place}, step=self._newest)

    def close(self) -> None:
        """Ends the run's upload."""
        self._run.finish()


def append_result(path: Path, result: Mapping[str, float]) -> None:
    """Adds one evaluation to ``results.jsonl``, durably."""
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def evaluated_epochs(path: Path) -> set[int]:
    """Epochs for which ``results.jsonl`` already has an evaluation."""
    return {int(line["epoch"]) for line in _lines(path) if "epoch" in line}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that a crash may have cut in its last line."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
