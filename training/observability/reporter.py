"""Reports a run: log lines in OpenCLIP's form, metrics to the sinks, evaluations to results.jsonl. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from training.observability.console import ProgressLine
from training.observability.metrics import Countdown, RunningMean, format_duration
from training.observability.sinks import MetricSink, append_result

logger = logging.getLogger(__name__)


class Standing(NamedTuple):
    """Where a run stands after a step."""

    epoch: int
    """The step's."""
    samples: int
    """Of this epoch."""
    epoch_share: float
    """The same as a share of what the epoch trains on."""
    begins_epoch: bool
    """Whether the step was the first of its epoch."""
    steps_done: int
    total_steps: int
    """At the present global batch, as is ``steps_done``."""
    left: float
    """What remains of the run, in steps that cost what the present ones do."""


class Reporter:
    """Takes finished numbers from the loop and decides nothing but their form."""

    def __init__(
        self,
        *,
        sinks: Sequence[MetricSink],
        detail_sinks: Sequence[MetricSink] = (),
        progress: ProgressLine,
        results_path: Path | None,
        samples_per_epoch: int,
    ) -> None:
        self._sinks = sinks
        self.detail_sinks = detail_sinks
        """Where goes what is not measured at every log point: telemetry, saves, events."""
        self._progress = progress
        self._results_path = results_path
        self._samples_per_epoch = samples_per_epoch
        self._countdown = Countdown()
        self._epoch_loss = RunningMean()
        self._lost = 0

    def step(self, step: int, metrics: Mapping[str, float], *, standing: Standing, log_line: bool) -> None:
        """Reports step number ``step`` (counted from 0): to the sinks, and as a line when ``log_line``."""
        self._write(self._sinks, step, {f"train/{name}": value for name, value in metrics.items()})
        if standing.begins_epoch:
            self._epoch_loss.reset()
        self._epoch_loss.add(metrics["loss"])
        remaining_s = self._countdown.remaining_s(standing.left, step_s=metrics["batch_time"])
        if log_line:
            logger.info("%s", self._line(standing, metrics, remaining_s=remaining_s))
        self._progress.show(
            step=standing.steps_done,
            total_steps=standing.total_steps,
            samples_per_second=metrics["samples_per_second"],
            loss=metrics["loss"],
            remaining_s=remaining_s,
        )

    def restart_clock(self) -> None:
        """Steps take another time from here on."""
        self._countdown = Countdown()

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hands details under their full names to their sinks, without a line."""
        self._write(self.detail_sinks, step, numbers)

    def _line(self, standing: Standing, metrics: Mapping[str, float], *, remaining_s: float) -> str:
        digits = len(str(self._samples_per_epoch))
        mean = self._epoch_loss.mean
        return (
            f"Train Epoch: {standing.epoch} [{standing.samples:>{digits}}/{self._samples_per_epoch} "
            f"({100 * standing.epoch_share:.0f}%)] "
            f"Data (t): {metrics['data_time']:.3f} "
            f"Batch (t): {metrics['batch_time']:.3f}, {metrics['samples_per_second']:#g}/s, "
            f"{metrics['samples_per_second_per_gpu']:#g}/s/gpu "
            f"LR: {metrics['lr']:.6f} Logit Scale: {metrics['logit_scale']:.3f} "
            f"Contrastive_loss: {metrics['contrastive_loss']:#.5g} ({mean:#.5g}) "
            f"Loss: {metrics['loss']:#.5g} ({mean:#.5g}) ETA {format_duration(remaining_s)}{_slowest(metrics)}"
        )

    def evaluation(self, step: int, result: Mapping[str, float], *, epoch: int) -> None:
        """Reports one evaluation: a log line, the sinks (``val/*`` at the epoch, as OpenCLIP), results.jsonl."""
        shown = "\t".join(f"{name}: {value:.4f}" for name, value in result.items() if name != "epoch")
        logger.info("Eval Epoch: %d %s", epoch, shown)
        numbers = {f"val/{name}": value for name, value in result.items() if name != "epoch"}
        self._write(self._sinks, step, numbers, epoch=epoch)
        if self._results_path is not None:
            path = self._results_path
            self._try(lambda: append_result(path, {**result, "epoch": epoch}))

    def close(self) -> None:
        """Flushes every sink."""
        self._progress.clear()
        for sink in {*self._sinks, *self.detail_sinks}:
            self._try(sink.close)
        if self._lost:
            logger.warning("%d times something could not be written: the metrics of this run have gaps.", self._lost)

    def _write(
        self, sinks: Sequence[MetricSink], step: int, numbers: Mapping[str, float], *, epoch: int | None = None
    ) -> None:
        for sink in sinks:
            self._try(partial(sink.write, step, numbers, epoch=epoch))

    def _try(self, write: Callable[[], None]) -> None:
        """A full disk costs numbers, not the run; the first time is logged."""
        try:
            write()
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                logger.error("Metrics cannot be written (%s): training goes on.", error)


def _slowest(metrics: Mapping[str, float]) -> str:
    """Whom all ranks waited for, at the end of the line, where what reads OpenCLIP's lines does not look."""
    if "straggler/rank" not in metrics:
        return ""
    return (
        f" Slowest: rank {metrics['straggler/rank']:.0f} "
        f"(compute {metrics['straggler/compute_seconds']:.3f} s, data {metrics['straggler/data_wait_seconds']:.3f} s, "
        f"others {metrics['straggler/others_seconds']:.3f} s)"
    )
