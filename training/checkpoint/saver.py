"""Saves a run beside its training: decides when, stages the state, and answers for what became of it.

    request -> busy? dropped, or waited for -> stage (training waits) -> write, commit, export (training goes on)
            -> poll: saved, or failed and counted

A step checkpoint is what a run resumes from; OpenCLIP's epoch files are made from it afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoint.background import BackgroundWriter
from training.checkpoint.capture import Captured, capture
from training.checkpoint.checkpointer import Checkpointer, new_token
from training.checkpoint.export import LATEST_NAME, delete_epoch_file, epoch_content, saved_epoch, write_epoch_file
from training.checkpoint.manifest import read_manifest, read_train, verify
from training.checkpoint.run_state import RunParts, rewind_before
from training.checkpoint.staging import Staging
from training.checkpoint.tags import Tags, rewind_order
from training.config import CheckpointConfig
from training.distributed.collectives import broadcast_object, gather_objects
from training.distributed.runtime import Runtime

logger = logging.getLogger(__name__)

_OVERDUE_S = 600.0


class SavedStep(NamedTuple):
    """A checkpoint that was written."""

    step: int
    stall_ms: float
    """How long training waited."""
    bytes: int
    write_s: float
    """How long writing took, beside the training."""


class EpochFiles(NamedTuple):
    """The files in OpenCLIP's layout that are due after an epoch."""

    epoch: int
    numbered: bool
    latest: bool
    delete_epoch: int | None = None
    """The epoch whose file goes once the new one is there."""


class _Done(NamedTuple):
    """What a job in the background came to."""

    step: int
    saved: SavedStep | None
    """None where only epoch files were due, and on ranks that write a part of the state only."""
    export_fault: str


class Saver:
    """Writes what the flags ask for. All ranks call it; failures are counted and raised on rank 0."""

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
        epoch_files: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            epoch_files: whether OpenCLIP's files are made of what is saved (not with ``--fsdp-checkpoint sharded``).
        """
        self._config = config
        self._checkpointer = checkpointer
        self._parts = parts
        self._runtime = runtime
        self._run_config = run_config
        self._name = name
        self._epochs = epochs
        self._epoch_files = epoch_files
        self._clock = clock
        self._staging = Staging(runtime.device)
        if runtime.is_main:
            checkpointer.clean_up()
        self._writer: BackgroundWriter[_Done] = BackgroundWriter()
        self._reports: list[SavedStep] = []
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._last_request = clock()
        self._saved_step = -1
        self._coming_step: int | None = None
        self._started_at = 0.0
        self._is_overdue = False
        self._last_fault = ""
        self.failures = 0
        """Saves that failed, in a row."""
        self.dropped = 0
        """Requests that came while a save was still being written, of the whole run."""

    def is_due(self, step: int) -> bool:
        """Whether a step within an epoch is saved (``--save-every-n-steps``)."""
        every = self._config.save_every_n_steps
        return every > 0 and step % every == 0

    def request_due_by_clock(self) -> bool:
        """Whether ``--save-every-n-minutes`` have passed since the last save or the last request. On rank 0.

        The step that is saved is for all ranks to agree on; the clock is monotonic, so it cannot jump.
        """
        every_s = self._config.save_every_n_minutes * 60
        if every_s <= 0 or self._clock() - self._last_request < every_s:
            return False
        self._last_request = self._clock()
        return True

    def save_step(self, *, epoch: int, reason: str = "interval", wait: bool = False) -> bool:
        """Begins a step checkpoint; ``epoch`` is the number of completed epochs. Collective: all ranks.

        Args:
            reason: for the log.
            wait: if a save is still being written, wait for it instead of dropping this one.

        Returns:
            Whether the state is saved or being saved: the same on all ranks.
        """
        return self._save(epoch=epoch, reason=reason, wait=wait, files=None)

    def save_epoch(self, epoch: int) -> None:
        """Begins a step checkpoint and the epoch files due after ``epoch`` completed epochs. Collective: all ranks."""
        files = self._files_due(epoch)
        self._save(epoch=epoch, reason="epoch", wait=True, files=files if files.numbered or files.latest else None)

    def export_owed(self, epoch: int) -> None:
        """Makes up for the epoch files that are due after ``epoch`` completed epochs and are not there.

        Call it when a start stands at the end of an epoch: the one before may have ended between the checkpoint of
        that step and its epoch files, or had no space for them. In the background, on rank 0; no collective.
        """
        step = self._parts.state.step
        if self._runtime.is_main and epoch > 0 and step in self._checkpointer.steps():
            self._writer.wait()
            self._start(step, partial(self._export_owed, step, self._files_due(epoch)))

    def save_now_and_wait(self, epoch: int, reason: str) -> bool:
        """Saves and returns when it is on the disk: on a signal, at the exit, after a rewind. Collective: all ranks.

        Returns:
            Whether the state after this step is on the disk: the same on all ranks.
        """
        self._save(epoch=epoch, reason=reason, wait=True, files=None)
        self._writer.wait()
        self._settle()
        return broadcast_object(self._saved_step == self._parts.state.step)  # collective: all ranks

    def note_saved(self, step: int) -> None:
        """The state is that of a checkpoint which is on the disk: it need not be written again. All ranks."""
        self._saved_step = step

    def poll(self) -> list[SavedStep]:
        """What was saved since the last call; cheap enough for every step. No collective; on other ranks nothing.

        Raises:
            RuntimeError: ``--max-save-failures`` saves in a row have failed; on rank 0. Or what the fence raised:
                another start owns the run, and this one must end.
        """
        self._settle()
        if self._writer.busy and not self._is_overdue and self._clock() - self._started_at > _OVERDUE_S:
            self._is_overdue = True
            logger.warning("The save of step %s has been written for %.0f s.", self._coming_step, _OVERDUE_S)
        reports, self._reports = self._reports, []
        return reports

    def report_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation after ``step`` steps, for ``--keep-best``. On rank 0."""
        wanted = self._config.keep_best
        if wanted is None or not metrics:
            return
        if wanted not in metrics:
            logger.warning("--keep-best %s: the evaluation has only %s.", wanted, ", ".join(sorted(metrics)))
            return
        self._metrics[step] = metrics
        self._note_best()

    def tag_good(self, step: int) -> bool:
        """Marks a checkpoint as one that training went on well from. On rank 0; returns whether there is one."""
        if not self._runtime.is_main or step not in self._checkpointer.steps():
            return False
        self._checkpointer.change_tags(lambda tags: tags.with_good(step))
        return True

    def untagged(self) -> list[int]:
        """Checkpoints up to where the run stands of which nothing is known yet. On rank 0; on other ranks none.

        When a run starts again, training may go on well from those that were saved before.
        """
        if not self._runtime.is_main:
            return []
        tags, here = self._checkpointer.tags(), self._parts.state.step
        return [step for step in self._checkpointer.steps() if step <= here and step not in tags.good | tags.suspect]

    def tag_suspect(self, from_step: int) -> list[int]:
        """Marks the checkpoints from a step on, also one that is being written; returns their steps. On rank 0."""
        if not self._runtime.is_main:
            return []
        coming = [] if self._coming_step is None else [self._coming_step]
        return self._checkpointer.tag_suspect(from_step, coming=coming)

    def can_rewind(self, onset: int) -> bool:
        """Whether there is a checkpoint from before ``onset``, once what is being written is there. On rank 0."""
        self._writer.wait()
        self._settle()
        return bool(rewind_order(self._checkpointer.steps(), self._checkpointer.tags(), onset=onset))

    def rewind(self, onset: int) -> int:
        """Takes the parts back to the best checkpoint from before ``onset``; returns its step. Collective: all ranks.

        Checkpoints from the onset on become suspect first. Data and counters stay where they are: skip the data to
        where training shall go on, then ``save_now_and_wait``.

        Raises:
            DamagedCheckpoint: there is none that is whole; on all ranks.
        """
        self.tag_suspect(onset)
        self._writer.wait()
        self._settle()
        path = rewind_before(onset, self._checkpointer, self._parts, runtime=self._runtime)
        self._saved_step = -1  # of this step, that is: the state is another one now
        return read_step(path)

    def finish(self) -> None:
        """Waits for what is being written.

        Raises:
            RuntimeError: the last save failed; on rank 0.
        """
        self._writer.wait()
        self._settle()
        if self._last_fault:
            raise RuntimeError(f"The last save of the run failed ({self._last_fault}): {self._remedy()}")

    def _files_due(self, epoch: int) -> EpochFiles:
        if not self._epoch_files:
            return EpochFiles(epoch, numbered=False, latest=False)
        frequency = self._config.save_frequency
        numbered = epoch == self._epochs or (frequency > 0 and epoch % frequency == 0)
        deletes = self._config.delete_previous_checkpoint and numbered and frequency > 0
        return EpochFiles(epoch, numbered, self._config.save_most_recent, epoch - frequency if deletes else None)

    def _save(self, *, epoch: int, reason: str, wait: bool, files: EpochFiles | None) -> bool:
        start = time.perf_counter()
        step = self._parts.state.step
        if wait:
            self._writer.wait()
        self._settle()
        self._last_request = self._clock()
        known = step in (self._saved_step, self._coming_step)
        ranks = gather_objects((self._writer.busy, known))  # collective: all ranks
        if ranks[0][1]:  # only rank 0 knows which saves have become checkpoints
            if files is not None and self._runtime.is_main:
                self._start(step, partial(self._export_only, step, files))
            return True
        if any(busy for busy, _ in ranks):
            self._drop(step)
            return False
        token = broadcast_object(self._open_staging(step) if self._runtime.is_main else "")  # collective: all ranks
        captured = capture(
            self._parts, runtime=self._runtime, epoch=epoch, config=self._run_config, staging=self._staging
        )  # collective: all ranks
        if self._runtime.rank in captured.writers:
            stall_ms = (time.perf_counter() - start) * 1e3
            logger.debug("Staged step %d (%s) in %.0f ms.", step, reason, stall_ms)
            self._start(step, partial(self._write, step, token, captured, stall_ms=stall_ms, files=files))
        return True

    def _open_staging(self, step: int) -> str:
        """The token of a new attempt, whose directory is there before another rank can write to it. On rank 0."""
        token = new_token()
        with suppress(OSError):  # then rank 0's share cannot be written either, and that is counted
            self._checkpointer.open_staging(self._checkpointer.new_staging(step, token=token))
        return token

    def _start(self, step: int, job: Callable[[], _Done]) -> None:
        self._coming_step = step
        self._started_at = self._clock()
        self._is_overdue = False
        self._writer.start(job)

    def _drop(self, step: int) -> None:
        self.dropped += 1
        if self._runtime.is_main:
            logger.warning(
                "The save of step %d is left out: that of step %s has been written for %.0f s already (%d left out so "
                "far). Save less often (--save-every-n-steps), or to a faster disk.",
                *(step, self._coming_step, self._clock() - self._started_at, self.dropped),
            )

    def _write(self, step: int, token: str, captured: Captured, *, stall_ms: float, files: EpochFiles | None) -> _Done:
        """The job of a writer, in the background; rank 0's ends with the commit and the epoch files."""
        start = time.perf_counter()
        checkpointer, runtime = self._checkpointer, self._runtime
        staging = checkpointer.new_staging(step, token=token)
        try:
            checkpointer.write_share(staging, captured.share, writer=runtime.rank)
        except BaseException:
            if runtime.is_main:
                checkpointer.abandon(staging)
            raise
        if not runtime.is_main:
            return _Done(step, None, "")
        ranks = {"world_size": runtime.world_size, "shard_ranks": captured.shard_ranks}
        path = checkpointer.commit(step, staging, writers=captured.writers, **ranks)
        num_bytes = sum(facts.size for facts in read_manifest(path).files.values())
        saved = SavedStep(step, stall_ms, num_bytes, time.perf_counter() - start)
        return _Done(step, saved, self._export(path, files))

    def _export_only(self, step: int, files: EpochFiles) -> _Done:
        return _Done(step, None, self._export(self._checkpointer.path(step), files))

    def _export_owed(self, step: int, due: EpochFiles) -> _Done:
        """The files of ``due`` that are missing, or older; nothing that was deleted because there is a later one."""
        root, directory = self._checkpointer.root, self._checkpointer.path(step)
        numbered = due.numbered and not (root / f"epoch_{due.epoch}.pt").exists()
        if due.delete_epoch is not None and (root / f"epoch_{2 * due.epoch - due.delete_epoch}.pt").exists():
            numbered = False
        latest = due.latest and (saved_epoch(root / LATEST_NAME) or 0) < due.epoch
        if not (numbered or latest) or read_train(directory).get("epoch") != due.epoch:
            return _Done(step, None, "")
        verify(directory)
        logger.info("Epoch %d has a checkpoint (%s) and lacks files that are made from it.", due.epoch, directory)
        files = EpochFiles(due.epoch, numbered, latest, due.delete_epoch if numbered else None)
        return _Done(step, None, self._export(directory, files))

    def _export(self, directory: Path, files: EpochFiles | None) -> str:
        """Writes epoch files from a checkpoint on the disk; returns what went wrong. Does not touch the live state."""
        if files is None:
            return ""
        try:
            self._checkpointer.check_fence()
            with self._checkpointer.scratch() as scratch:
                written = write_epoch_file(
                    self._checkpointer.root,
                    epoch_content(directory, name=self._name, epoch=files.epoch, scratch=scratch),
                    epoch=files.epoch,
                    numbered=files.numbered,
                    latest=files.latest,
                )
            for path in written:
                logger.info("Saved %s.", path)
            if files.delete_epoch is not None:
                delete_epoch_file(self._checkpointer.root, epoch=files.delete_epoch)
        except Exception as error:  # the checkpoint is there; what failed is the copy for other tools
            if error is self._checkpointer.fenced_by:
                raise
            return f"epoch_{files.epoch}.pt: {error!r}"
        return ""

    def _settle(self) -> None:
        """Takes note of what has become of the jobs."""
        for done, error in self._writer.finished():
            self._coming_step = None
            if error is not None and error is self._checkpointer.fenced_by:
                raise error
            if error is not None:
                self._note_failure(f"{type(error).__name__}: {error}")
            elif done is not None:
                self._note_success(done)

    def _note_success(self, done: _Done) -> None:
        if done.saved is not None:
            self._saved_step = done.step
            self._reports.append(done.saved)
            self._note_best()
            gigabytes = done.saved.bytes / 1e9
            logger.info(
                "Saved %s: %.3f GB in %.1f s; training waited %.0f ms (%.0f ms/GB).",
                *(self._checkpointer.path(done.step), gigabytes, done.saved.write_s, done.saved.stall_ms),
                done.saved.stall_ms / gigabytes,
            )
        if done.export_fault:
            self._note_failure(done.export_fault)
        else:
            self.failures, self._last_fault = 0, ""

    def _note_failure(self, fault: str) -> None:
        """On rank 0 it counts; another writer's failure reaches rank 0 through its receipt."""
        if not self._runtime.is_main:
            logger.warning("This rank's part of a checkpoint could not be written: %s.", fault)
            return
        self.failures += 1
        self._last_fault = fault
        limit = self._config.max_save_failures
        logger.error("A save failed (%d in a row, %d end the run): %s.", self.failures, limit, fault)
        if self.failures >= limit:
            raise RuntimeError(f"{self.failures} saves in a row have failed, the last with {fault}: {self._remedy()}")

    def _note_best(self) -> None:
        """Evaluations of steps whose checkpoint is on the disk by now."""
        metric = self._config.keep_best or ""
        on_disk = self._checkpointer.steps() if self._metrics else []
        for step in [step for step in self._metrics if step != self._coming_step]:
            value = self._metrics.pop(step)[metric]
            if step in on_disk:
                self._checkpointer.change_tags(partial(Tags.with_metric, metric=metric, step=step, value=value))

    def _remedy(self) -> str:
        return (
            f"if it is the disk, repair it or free space on {self._checkpointer.root}; then start again "
            "(--resume latest), or raise --max-save-failures. Earlier checkpoints are untouched."
        )


def read_step(directory: Path) -> int:
    """The step of a checkpoint directory, by its name."""
    return int(directory.name.removeprefix("step_"))
