"""Notes where a run's loop makes the host wait for the device, between two log points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training.measurement import Measurement

FIRST, LAST = 3, 6
"""Steps, counted from 0, that are watched: the first ones create states and choose kernels, and verdicts are known two
steps later."""

_aten = torch.ops.aten
_WAITS = {
    *(_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default, _aten.nonzero.default),
    *(_aten.masked_select.default, _aten._unique2.default, _aten.repeat_interleave.Tensor),
}
"""Operations whose result, or its shape, the host must know."""
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class HostWaits(TorchDispatchMode):
    """Names of the operations that would wait if the tensors were on a GPU; they are on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if function in _WAITS or (function in _INDEXING and any(_is_mask(index) for index in args[1])):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def watch_steps(monkeypatch: pytest.MonkeyPatch, *, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Calls ``begin`` when the batch of step ``FIRST`` is there, and ``end`` when that of ``LAST`` is."""
    begin_step = Measurement.begin_step
    steps = iter(range(LAST + 1))

    def begin_watched_step(self: Measurement, *, waited_s: float) -> None:
        step = next(steps, None)
        if step == LAST:
            end()
        begin_step(self, waited_s=waited_s)
        if step == FIRST:
            begin()

    monkeypatch.setattr(Measurement, "begin_step", begin_watched_step)
