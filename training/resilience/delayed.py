"""Brings small results of the device to the host a few steps later, without making either of them wait."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from training.resilience.guard import Vitals

LAG = 2
"""Steps between a verdict and the host's knowledge of it; on a CPU too, so that tests there run what runs elsewhere."""


class _Copy(NamedTuple):
    step: int
    values: Tensor
    arrived: torch.cuda.Event | None


class DelayedVitals:
    """A queue of vitals on their way to the host.

    What is ready depends on the number of steps alone, never on how fast a copy was: all ranks see the same at the
    same step, and decide the same. If the device is further behind than the lag, ``ready`` waits for it, with that
    many steps still queued on it.
    """

    def __init__(self, lag: int = LAG) -> None:
        self._lag = lag
        self._copies: deque[_Copy] = deque()

    def push(self, step: int, vitals: Tensor) -> None:
        """Starts the copy of one step's vitals."""
        if vitals.device.type != "cuda":
            self._copies.append(_Copy(step, vitals, None))
            return
        host = torch.empty(vitals.shape, dtype=vitals.dtype, pin_memory=True)
        host.copy_(vitals, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copies.append(_Copy(step, host, arrived))

    def ready(self) -> list[tuple[int, Vitals]]:
        """The vitals of steps that are at least the lag behind the newest, oldest first; each of them once."""
        return self._take(len(self._copies) - self._lag)

    def drain(self) -> list[tuple[int, Vitals]]:
        """All that is left: at the end, and before something that must not happen too late. Host sync."""
        return self._take(len(self._copies))

    def _take(self, count: int) -> list[tuple[int, Vitals]]:
        taken = [self._copies.popleft() for _ in range(max(0, count))]
        return [(copy.step, _read(copy)) for copy in taken]


def _read(copy: _Copy) -> Vitals:
    if copy.arrived is not None:
        copy.arrived.synchronize()
    return Vitals.from_values(copy.values.tolist())
