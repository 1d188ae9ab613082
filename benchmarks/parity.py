"""The gates around every timing: both arms compute the same losses and gradients, or their ratio does not count.

before   fp32 gradients of every parameter on a small batch, losses of the first steps
after    losses of all steps, timed or not: both arms have trained on the same batches in the same order
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import HostBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.train_step_arms import StepArm

GRADIENT_TOLERANCE = 1e-4
"""Largest |difference| / largest |gradient|, per parameter, fp32."""
LOSS_TOLERANCE = {"fp32": 1e-5}
"""Largest relative difference of the losses of the first steps."""
CURVE_TOLERANCE = {"fp32": 1e-4}
"""Largest mean of the relative differences over all steps: rounding grows with every update."""
LOW_PRECISION_LOSS_TOLERANCE = 2e-2
"""Of both, in bf16."""
_SMALL = 8
"""Pairs in the batch on which gradients are compared."""


class Parity(NamedTuple):
    """How far the arms were apart at the start."""

    ours: list[float]
    theirs: list[float]
    loss_difference: float
    loss_tolerance: float
    gradient_difference: float | None
    """None where the parameters are not fp32: their gradients are not comparable."""


class CurveParity(NamedTuple):
    """How far the losses of all steps were apart, relative."""

    steps: int
    mean: float
    greatest: float
    tolerance: float
    """Of the mean."""
    skipped_steps: int
    """By our guard; OpenCLIP has none."""

    @property
    def holds(self) -> bool:
        """Whether both arms trained the same model."""
        return self.mean <= self.tolerance and self.skipped_steps == 0


@contextmanager
def exact_matmul() -> Iterator[None]:
    """TF32 off inside: its rounding is larger than the tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def check_gradients(ours: StepArm, theirs: StepArm, batch: HostBatch) -> float | None:
    """The worst relative difference of a gradient on a small part of a batch, without compilation.

    Raises:
        RuntimeError: the arms do not compute the same thing; a ratio of their speeds would mean nothing.
    """
    if any(parameter.dtype != torch.float32 for parameter in ours.model.parameters()):
        return None
    small = HostBatch(batch.images[:_SMALL], batch.texts[:_SMALL])
    # Compiled programs of a shape and type that no step uses would cost minutes: the losses speak for compilation.
    with exact_matmul(), torch.compiler.set_stance("force_eager"):
        mine, other = _gradients(ours, small), _gradients(theirs, small)
    if mine.keys() != other.keys():
        raise RuntimeError(f"only one arm has a gradient for {sorted(mine.keys() ^ other.keys())[:5]}")
    apart = {name: _relative(mine[name], other[name]) for name in mine}
    worst = max(apart, key=apart.__getitem__)
    if not apart[worst] <= GRADIENT_TOLERANCE:
        raise RuntimeError(f"gradient of {worst} differs by {apart[worst]:.2e} (tolerance {GRADIENT_TOLERANCE:.0e})")
    return apart[worst]


def check_losses(
    ours: Sequence[float], theirs: Sequence[float], *, precision: str, gradient_difference: float | None
) -> Parity:
    """Of the first optimizer steps.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    difference = max(_differences(ours, theirs))
    tolerance = LOSS_TOLERANCE.get(precision, LOW_PRECISION_LOSS_TOLERANCE)
    if not difference <= tolerance:
        pairs = list(zip(ours, theirs, strict=True))
        raise RuntimeError(f"losses differ by {difference:.2e} (tolerance {tolerance:.0e}): {pairs}; no timing counts")
    return Parity(list(ours), list(theirs), difference, tolerance, gradient_difference)


def compare_curves(
    ours: Sequence[float], theirs: Sequence[float], *, precision: str, skipped_steps: int
) -> CurveParity:
    """Of all steps, in their order."""
    apart = _differences(ours, theirs)
    tolerance = CURVE_TOLERANCE.get(precision, LOW_PRECISION_LOSS_TOLERANCE)
    return CurveParity(len(apart), sum(apart) / len(apart), max(apart), tolerance, skipped_steps)


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True)]


def _gradients(arm: StepArm, batch: HostBatch) -> dict[str, Tensor]:
    (prepared,) = arm.prepare([batch])
    arm.model.zero_grad(set_to_none=True)
    arm.loss(prepared).backward()
    found = {
        name: parameter.grad.clone() for name, parameter in arm.model.named_parameters() if parameter.grad is not None
    }
    arm.model.zero_grad(set_to_none=True)
    return found


def _relative(mine: Tensor, other: Tensor) -> float:
    scale = other.abs().max().clamp(min=1e-12)
    return ((mine - other).abs().max() / scale).item()
