"""Averages the weights of checkpoints: a "soup" of the last ones is often better than any of them.

Source: Wortsman et al. 2022, "Model soups"; of one run's last checkpoints: Izmailov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.checkpoint.checkpointer import is_finite, read_parts
from training.checkpoint.manifest import verify


def read_weights(directory: Path) -> Mapping[str, Tensor]:
    """The weights of a step checkpoint, after all of it was verified; memory is taken for what is looked at.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
    """
    return read_parts(directory, verify(directory), "model")


def average_weights(models: Sequence[Mapping[str, Tensor]], *, names: Sequence[str]) -> dict[str, Tensor]:
    """The mean of each weight, summed in double precision, one weight at a time.

    Counters and other integers cannot be averaged: they are those of the last model.

    Args:
        models: by parameter name.
        names: what to call each model in an error.

    Raises:
        ValueError: nothing to average, or the models differ in their parameters, or one is not finite.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} checkpoints are no average: name two or more with --steps or --last.")
    first = models[0]
    for model, name in zip(models[1:], names[1:], strict=True):
        differing = [key for key in sorted(first.keys() | model.keys()) if _kind(first, key) != _kind(model, key)]
        if differing:
            raise ValueError(
                f"{names[0]} and {name} are not of the same model: {len(differing)} parameters differ, such as "
                f"{differing[0]!r} ({_kind(first, differing[0])} and {_kind(model, differing[0])})."
            )
    return {key: _mean(key, [model[key] for model in models], names) for key in first}


def _mean(key: str, tensors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    for tensor, name in zip(tensors, names, strict=True):
        if not is_finite(tensor):
            raise ValueError(f"{name} holds weights that are not finite ({key!r}): leave it out.")
    last = tensors[-1]
    if not last.is_floating_point():
        return last.clone()
    total = torch.zeros(last.shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(last.dtype)


def _kind(model: Mapping[str, Tensor], key: str) -> str:
    if key not in model:
        return "absent"
    return f"{str(model[key].dtype).removeprefix('torch.')} {tuple(model[key].shape)}"
