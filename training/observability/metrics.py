"""Turns the steps between two log points into the numbers that are logged."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from models.packing import PackedTexts


class StepClock:
    """Where the time of a window of steps went. Throughput is that of the whole window, not of its last step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self._start = time.perf_counter()
        self.data_wait_s = 0.0
        self._steps = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the window began; never 0."""
        return max(time.perf_counter() - self._start, 1e-9)

    def add_step(self, *, data_wait_s: float) -> None:
        """Counts one finished step and the time it waited for data."""
        self.data_wait_s += data_wait_s
        self._steps += 1

    def read(self, *, samples_per_step: int, world_size: int) -> dict[str, float]:
        """Seconds per step and samples per second, under OpenCLIP's names; ``data_wait_pct`` is ours."""
        elapsed = self.elapsed_s
        steps = max(1, self._steps)
        samples_per_second = samples_per_step * self._steps / elapsed
        return {
            "data_time": self.data_wait_s / steps,
            "batch_time": elapsed / steps,
            "samples_per_second": samples_per_second,
            "samples_per_second_per_gpu": samples_per_second / world_size,
            "data_wait_pct": 100.0 * self.data_wait_s / elapsed,
        }


@dataclass
class TokenCount:
    """How many text tokens the model computed, beside those of the same batches with their padding. This rank's own."""

    computed: int = 0
    padded: int = 0
    texts: int = 0

    def add(self, texts: Tensor | PackedTexts) -> None:
        """Counts a batch. Lengths are known on the host: nothing waits for the device."""
        if isinstance(texts, PackedTexts):
            self.computed += len(texts.tokens)
            self.padded += texts.num_texts * texts.context_length
            self.texts += texts.num_texts
        else:
            self.computed += texts.numel()
            self.padded += texts.numel()
            self.texts += len(texts)

    def read(self) -> dict[str, float]:
        """Computed tokens in percent of the padded ones, and per caption; empty without any."""
        if not self.texts:
            return {}
        return {
            "text_tokens_pct": 100.0 * self.computed / self.padded,
            "text_tokens_per_sample": self.computed / self.texts,
        }


@dataclass
class RunningMean:
    """The mean of the values since the last reset."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Adds one value."""
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        """Mean of the values added; 0 without any."""
        return self.total / self.count if self.count else 0.0

    def reset(self) -> None:
        """Forgets all values."""
        self.total, self.count = 0.0, 0


class Countdown:
    """Estimates the time that remains from the recent time per step: a slow start is soon forgotten."""

    _MEMORY = 0.8
    """Weight of the past at each measurement."""

    def __init__(self) -> None:
        self._step_s: float | None = None

    def remaining_s(self, steps_left: float, *, step_s: float) -> float:
        """Seconds that so many steps take, after a window whose steps took ``step_s`` seconds each."""
        past = step_s if self._step_s is None else self._step_s
        self._step_s = self._MEMORY * past + (1 - self._MEMORY) * step_s
        return self._step_s * steps_left


def format_duration(seconds: float) -> str:
    """``3725`` -> ``1:02:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
