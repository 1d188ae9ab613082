"""Measures the part of each step that a rank computes by itself, before any other rank can make it wait.

    batch is there |=== zero gradients, forward ===| the loss needs all texts: from here on ranks wait for each other
                      ^ DDP's prologue is left out, which may exchange buffers

Only this part tells a slow rank from one that waits for it. On a GPU the marks are events on the stream of the step:
nothing waits for them while a step is under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

_Mark = float | torch.cuda.Event


class Computed(NamedTuple):
    """What one rank did by itself."""

    seconds: float
    steps: int


class ComputeClock:
    """Adds up the stretches between ``start`` and ``stop`` of the steps since the last ``read``.

    With accumulation they hold the forward passes without gradient. SyncBatchNorm makes ranks wait for each other
    within their forward pass, and all of them take as long as the slowest.
    """

    def __init__(self, device_type: str) -> None:
        self._on_gpu = device_type == "cuda"
        self._in_step = False
        self._since: _Mark | None = None
        self._open: deque[tuple[_Mark, _Mark]] = deque()
        """Stretches of which the device may not have reached the end."""
        self._seconds = 0.0
        self._steps = 0

    def start(self) -> None:
        """The batch of a step is there."""
        self._collect()
        self._in_step = True
        self._steps += 1
        self._since = self._mark()

    def stop(self) -> None:
        """Other ranks come next: the rest of the step is not counted."""
        self._pause()
        self._in_step = False

    @contextmanager
    def paused_until_called(self, module: nn.Module) -> Iterator[None]:
        """What happens inside counts from the moment that ``module`` is called."""
        self._pause()
        hook = module.register_forward_pre_hook(lambda *_: self._resume())
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What happens inside is not counted, and the rest of the step is."""
        self._pause()
        was_in_step, self._in_step = self._in_step, False
        try:
            yield
        finally:
            self._in_step = was_in_step
            self._resume()

    def read(self) -> Computed:
        """Since the last call. Host sync on a GPU, but for steps that it has finished."""
        while self._open:
            self._add(*self._open.popleft())
        computed = Computed(self._seconds, self._steps)
        self._seconds, self._steps = 0.0, 0
        return computed

    def _pause(self) -> None:
        if self._since is not None:
            self._open.append((self._since, self._mark()))
            self._since = None

    def _resume(self) -> None:
        if self._in_step:
            self._since = self._mark()

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        """Adds what the device is done with, so that no more than a few steps' events are kept."""
        while self._open and _is_past(self._open[0][1]):
            self._add(*self._open.popleft())

    def _add(self, begin: _Mark, end: _Mark) -> None:
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            end.synchronize()  # host sync, unless it is past
            self._seconds += begin.elapsed_time(end) / 1000
        else:
            assert isinstance(end, float)
            self._seconds += end - begin


def _is_past(mark: _Mark) -> bool:
    """Asks the device without waiting for it."""
    return not isinstance(mark, torch.cuda.Event) or bool(mark.query())
