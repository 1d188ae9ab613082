"""Saves a run: a step checkpoint to resume from, and OpenCLIP's epoch files for its tools, when each is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.export import delete_epoch_file, write_epoch_file
from training.checkpoint.run_state import RunParts, capture, epoch_file_content
from training.config import CheckpointConfig
from training.distributed.runtime import Runtime

logger = logging.getLogger(__name__)


class Saver:
    """Writes what the flags ask for. All ranks call it; rank 0 writes."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        checkpointer: Checkpointer,
        parts: RunParts,
        runtime: Runtime,
        run_config: Mapping[str, Any],
        name: str,
        epochs: int,
    ) -> None:
        self._config = config
        self._checkpointer = checkpointer
        self._parts = parts
        self._runtime = runtime
        self._run_config = run_config
        self._name = name
        self._epochs = epochs

    def is_due(self, step: int) -> bool:
        """Whether a step within an epoch is saved (``--save-every-n-steps``)."""
        every = self._config.save_every_n_steps
        return every > 0 and step % every == 0

    def save_step(self, *, epoch: int) -> None:
        """Writes a step checkpoint; ``epoch`` is the number of completed epochs. Collective: all ranks."""
        start = time.perf_counter()
        checkpoint = capture(self._parts, runtime=self._runtime, epoch=epoch, config=self._run_config)
        if checkpoint is not None:
            path = self._checkpointer.save(self._parts.state.step, checkpoint)
            logger.info("Saved %s in %.1f s.", path, time.perf_counter() - start)

    def save_epoch(self, epoch: int) -> None:
        """Writes a step checkpoint and the epoch files due after ``epoch`` completed epochs. Collective: all ranks."""
        self.save_step(epoch=epoch)
        if not self._runtime.is_main:
            return
        frequency = self._config.save_frequency
        numbered = epoch == self._epochs or (frequency > 0 and epoch % frequency == 0)
        written = write_epoch_file(
            self._checkpointer.root,
            epoch_file_content(self._parts, epoch=epoch, name=self._name),
            epoch=epoch,
            numbered=numbered,
            latest=self._config.save_most_recent,
        )
        for path in written:
            logger.info("Saved %s.", path)
        if self._config.delete_previous_checkpoint and numbered and frequency > 0:
            delete_epoch_file(self._checkpointer.root, epoch=epoch - frequency)
