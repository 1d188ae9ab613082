"""Notes where a run's loop makes the host wait for the device, between two log points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
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
    *(_aten.masked_select.default, _aten.repeat_interleave.Tensor, _aten.bincount.default),
    *(_aten._unique.default, _aten._unique2.default, _aten.unique_dim.default),
    *(_aten.unique_consecutive.default, _aten.unique_dim_consecutive.default),
}
"""Operations whose result, or its shape, the host must know."""
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_ON_THE_HOST = (
    "training/data/",
    "models/packing.py",
    "training/resilience/delayed.py",
    "training/optim/update.py:_step",
)
"""What reads tensors here reads such as lie on the host in any case; the last one where weights are there, as here."""
_REPOSITORY = Path(__file__).resolve().parents[2]


class HostWaits(TorchDispatchMode):
    """Names of the operations that would wait if the tensors were on a GPU; they are on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> HostWaits:
        for name in ("cpu", "tolist", "numpy"):
            self._note_calls(Tensor, name, lambda *_, **__: True)
        self._note_calls(Tensor, "to", _names_the_host)
        for name in ("tensor", "as_tensor"):
            self._note_calls(torch, name, lambda *_, device=None, **__: device is not None)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if function in _WAITS or (function in _INDEXING and any(_is_mask(index) for index in args[1])):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))

    def _note_calls(self, owner: Any, name: str, waits: Callable[..., bool]) -> None:
        """Copies between host and device are no operations where both are the same."""
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            code = sys._getframe(1).f_code
            place = f"{code.co_filename.removeprefix(f'{_REPOSITORY}/')}:{code.co_name}"
            if waits(*args, **kwargs) and not place.startswith(_ON_THE_HOST):
                self.seen.append(f"{name} in {place}")
            return function(*args, **kwargs)

        self._patches.setattr(owner, name, noted)


def _names_the_host(tensor: Tensor, *args: Any, **kwargs: Any) -> bool:
    """By its name: a device that is passed on may be the tensor's own."""
    return any(value == "cpu" for value in (*args, *kwargs.values()) if isinstance(value, str))


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
