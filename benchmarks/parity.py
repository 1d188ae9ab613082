"""The gate in front of every timing: both arms compute the same losses and gradients, or no number is written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from training.data.batch import DeviceBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.train_step_arms import StepArm

GRADIENT_TOLERANCE = 1e-4
"""Largest |difference| / largest |gradient|, per parameter, fp32."""
LOSS_TOLERANCE = {"fp32": 1e-5}
"""Largest relative difference of the loss over the steps."""
LOW_PRECISION_LOSS_TOLERANCE = 2e-2


class Parity(NamedTuple):
    """How far the arms were apart."""

    ours: list[float]
    theirs: list[float]
    loss_difference: float
    loss_tolerance: float
    gradient_difference: float | None
    """None where the parameters are not fp32: their gradients are not comparable."""


@contextmanager
def exact_matmul() -> Iterator[None]:
    """TF32 off inside: its rounding is larger than the tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_parity(ours: StepArm, theirs: StepArm, batches: Sequence[DeviceBatch], *, precision: str) -> Parity:
    """Compare gradients on one small batch, then the losses of ``len(batches)`` optimizer steps.

    Raises:
        RuntimeError: the arms do not compute the same thing; a ratio of their speeds would mean nothing.
    """
    with exact_matmul():
        gradient_difference = _gradient_difference(ours, theirs, batches[0])
        losses = [(ours.step(batch).item(), theirs.step(batch).item()) for batch in batches]  # host sync
    difference = max(abs(mine - other) / abs(other) for mine, other in losses)
    tolerance = LOSS_TOLERANCE.get(precision, LOW_PRECISION_LOSS_TOLERANCE)
    if not difference <= tolerance:
        raise RuntimeError(f"losses differ by {difference:.2e} (tolerance {tolerance:.0e}): {losses}; no timing counts")
    mine, other = (list(column) for column in zip(*losses, strict=True))
    return Parity(mine, other, difference, tolerance, gradient_difference)


def _gradient_difference(ours: StepArm, theirs: StepArm, batch: DeviceBatch) -> float | None:
    assert isinstance(batch.texts, Tensor)
    small = DeviceBatch(batch.images[:8], batch.texts[:8])
    if any(parameter.dtype != torch.float32 for parameter in ours.model.parameters()):
        return None
    mine, other = _gradients(ours, small), _gradients(theirs, small)
    if mine.keys() != other.keys():
        raise RuntimeError(f"only one arm has a gradient for {sorted(mine.keys() ^ other.keys())[:5]}")
    apart = {name: _relative(mine[name], other[name]) for name in mine}
    worst = max(apart, key=apart.__getitem__)
    if not apart[worst] <= GRADIENT_TOLERANCE:
        raise RuntimeError(f"gradient of {worst} differs by {apart[worst]:.2e} (tolerance {GRADIENT_TOLERANCE:.0e})")
    return apart[worst]


def _gradients(arm: StepArm, batch: DeviceBatch) -> dict[str, Tensor]:
    arm.model.zero_grad(set_to_none=True)
    arm.loss(batch).backward()
    found = {name: parameter.grad for name, parameter in arm.model.named_parameters() if parameter.grad is not None}
    arm.model.zero_grad(set_to_none=True)
    return found


def _relative(mine: Tensor, other: Tensor) -> float:
    scale = other.abs().max().clamp(min=1e-12)
    return ((mine - other).abs().max() / scale).item()
