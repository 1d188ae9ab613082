"""How far each arm's gradients are from fp64 ones: what a curve in bf16 is too chaotic to show.

weights after the last step, some batches -> on | off | OpenCLIP, each in the run's precision -> distance from the
gradient of OpenCLIP's model in fp64, eager, on the same weights and batches
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.batches import HostBatch
from benchmarks.gradient_error import distance, exact_matmul
from benchmarks.parity import LEAST_DISTANCE, TIMES_RIVAL
from benchmarks.train_step_arms import ArmSettings, ClipyardArm, OpenClipArm, StepArm
from models.transformer import Transformer
from training.losses.contrastive import Loss

Errors = dict[str, dict[str, float]]
"""Arm -> image, text, whole, and the worst cosine of features: means over batches."""


def gradient_errors(
    weights: Mapping[str, Tensor],
    batches: Sequence[HostBatch],
    settings: ArmSettings,
    *,
    names: tuple[str, str, str],
    plain_loss: Loss,
    on_flags: Sequence[str] = (),
) -> Errors:
    """
    Args:
        names: of on, off and OpenCLIP.
        plain_loss: of off.
        on_flags: of a run, for on: what is compiled, checkpointed.
    """
    with exact_matmul() if settings.precision == "fp32" else nullcontext():
        rival = OpenClipArm(settings)
        off = ClipyardArm(settings, flags=["--text-packing=off"])
        off._step.loss = plain_loss
        for module in off.model.modules():
            if isinstance(module, Transformer):
                module.whole_last_block = True
        arms: dict[str, StepArm] = dict(zip(names, (ClipyardArm(settings, flags=on_flags), off, rival), strict=True))
        for arm in arms.values():
            arm.model.load_state_dict(weights, strict=True)
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
        for batch in batches:
            exact = rival.exact(rival.prepare([batch])[0], dtype=torch.float64)
            for name, arm in arms.items():
                found[name].append(distance(arm.passed(arm.prepare([batch])[0]), exact))
    keys = ("image", "text", "whole", "cosine")
    return {
        name: {
            key: float(f"{statistics.fmean(values):.7g}")
            for key, values in zip(keys, zip(*rows, strict=True), strict=True)
        }
        for name, rows in found.items()
    }


def is_as_near(errors: Errors, *, ours: str, rival: str) -> bool:
    """Whether ours is no further from exact than a multiple of the rival's own rounding, in either tower."""
    return all(
        errors[ours][tower] <= max(TIMES_RIVAL * errors[rival][tower], LEAST_DISTANCE)
        for tower in ("image", "text", "whole")
    )


def gradient_statement(errors: Errors, *, batches: int) -> str:
    """The result in words."""
    said = ", ".join(f"{name} {error['whole']:.1e}" for name, error in errors.items())
    return f"gradients after the last step, relative distance from fp64, mean of {batches} batches: {said}"
