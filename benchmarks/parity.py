"""The gates around every timing: both arms compute the same losses and gradients, or their ratio does not count.

before   fp32 gradients of every parameter on a small batch
         gradients and features of a whole batch by the very programs that are timed, in their precision
         losses of the first steps
after    losses of all steps, timed or not: both arms have trained on the same batches in the same order
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import HostBatch
from benchmarks.gradient_error import Distance, Pass, distance, exact_matmul, tower_of
from training.data.batch import DeviceBatch

if TYPE_CHECKING:
    from benchmarks.train_step_arms import OpenClipArm, StepArm

GRADIENT_TOLERANCE = 1e-4
"""Largest |difference| / largest |gradient|, per parameter, fp32."""
LOSS_TOLERANCE = {"fp32": 1e-5}
"""Largest relative difference of the losses of the first steps."""
CURVE_TOLERANCE = {"fp32": 1e-4}
"""Largest mean of the relative differences over all steps: rounding grows with every update."""
LOW_PRECISION_LOSS_TOLERANCE = 2e-2
"""Of both, in bf16."""
TIMES_RIVAL = 2.0
"""Our distance from exact gradients and features in units of the rival's own, by tower."""
TIMES_RIVAL_PARAMETER, TOWER_SHARE = 4.0, 1e-2
"""The same of each parameter, and of its tower's whole gradient: one parameter's error is more of chance."""
LEAST_DISTANCE = 1e-4
"""Allowed in any case: where the rival is exact, ours still adds in another order."""
LEAST_COSINE = 0.999
"""Of the features of a row. bf16 leaves 0.9999 and more; where the rival has less, twice its distance from 1."""
GREATEST_RIVAL_ERROR = 0.3
"""A rival whose own rounding is as much of its gradient could not tell right from wrong."""
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
    timed_form: TimedParity | None = None


class TimedParity(NamedTuple):
    """How far the programs that are timed are from the rival's model in full precision, on a whole batch."""

    ours: Distance
    theirs: Distance
    first_pass_s: tuple[float, float] = (0.0, 0.0)
    """Of both: what is compiled is compiled in it."""

    def as_json(self) -> dict[str, object]:
        """With the fields of its parts."""
        return {**self._asdict(), "ours": self.ours._asdict(), "theirs": self.theirs._asdict()}


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


def check_timed_form(ours: StepArm, theirs: OpenClipArm, our_batch: DeviceBatch, batch: DeviceBatch) -> TimedParity:
    """Compiled, packed, autocast as in the timing: as near to the exact gradient as the rival is. Weights stay.

    Raises:
        RuntimeError: ours computes something else, or the rival's own error is too large to tell.
    """
    exact = theirs.exact(batch)
    begin = time.monotonic()
    mine = ours.passed(our_batch)
    middle = time.monotonic()
    other = theirs.passed(batch)
    seconds = (middle - begin, time.monotonic() - middle)
    for name, found in (("ours", mine), ("the rival", other)):
        if found.gradients.keys() != exact.gradients.keys():
            missing = sorted(found.gradients.keys() ^ exact.gradients.keys())[:5]
            raise RuntimeError(f"{name} has other gradients than the exact pass, for one: {missing}")
    parity = TimedParity(distance(mine, exact), distance(other, exact), seconds)
    refuse_distance(parity)
    _refuse_parameters(mine, other, exact)
    return parity


def refuse_distance(parity: TimedParity) -> None:
    """Judges whole towers.

    Raises:
        RuntimeError: ours is further from exact than the rival's own rounding explains.
    """
    ours, theirs = parity.ours, parity.theirs
    for tower in ("image", "text", "whole"):
        found, rounding = getattr(ours, tower), getattr(theirs, tower)
        if not rounding <= GREATEST_RIVAL_ERROR:
            raise RuntimeError(f"the rival's own {tower} gradient is {rounding:.1e} from exact: it tells nothing")
        if not found <= max(TIMES_RIVAL * rounding, LEAST_DISTANCE):
            raise RuntimeError(
                f"timed program: {tower} gradient is {found:.1e} from exact, the rival's {rounding:.1e} "
                f"(tolerance: {TIMES_RIVAL:g} times that)"
            )
    least = min(LEAST_COSINE, 1 - TIMES_RIVAL * (1 - theirs.cosine))
    if not ours.cosine >= least:
        raise RuntimeError(f"timed program: cosine of features {ours.cosine:.5f} (tolerance {least:.5f})")


def _refuse_parameters(mine: Pass, other: Pass, exact: Pass) -> None:
    lengths: dict[str, float] = {}
    for name, right in exact.gradients.items():
        for part in {tower_of(name), "temperature"}:  # a scalar has no tower: it is judged by all that there is
            lengths[part] = lengths.get(part, 0.0) + right.double().square().sum().item()
    for name, right in exact.gradients.items():
        found, rounding = ((one.gradients[name].to(right.dtype) - right).norm().item() for one in (mine, other))
        allowed = TIMES_RIVAL_PARAMETER * rounding + TOWER_SHARE * lengths[tower_of(name)] ** 0.5
        if not found <= allowed:
            raise RuntimeError(f"timed program: gradient of {name} is {found:.1e} from exact (tolerance {allowed:.1e})")


def check_losses(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    precision: str,
    gradient_difference: float | None,
    timed_form: TimedParity | None = None,
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
    return Parity(list(ours), list(theirs), difference, tolerance, gradient_difference, timed_form)


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
