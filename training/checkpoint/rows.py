"""Puts what is read of a checkpoint where this rank keeps it: all of a tensor, or with FSDP its rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.checkpoint.optimizer_state import SEPARATOR
from training.checkpoint.pieces import copy_rows
from training.checkpoint.tensor_file import Entry
from training.distributed.sharding import Placement, local_parameters, local_state, placements


class WeightRows:
    """Takes weights and buffers, some rows at a time, into a model."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = local_state(model)
        """What this rank holds, by name."""
        self._places = placements(model)

    @torch.no_grad()
    def add(self, name: str, rows: Tensor, *, row: int = 0) -> None:
        """Takes over what this rank holds of rows from ``row`` on."""
        place = self._places.get(name)
        copy_rows(self.tensors[name], rows, target_row=place.start if place else 0, source_row=row)

    def take(self, entry: Entry, rows: Tensor) -> None:
        """The same of what a file holds."""
        self.add(entry.name, rows, row=entry.row)


class StateRows:
    """Gathers state of parameters (PARAMETER//STATE) for an optimizer, some rows at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        """What this rank holds, by name; complete when all was added."""
        self._parameters = local_parameters(model)
        self._places = placements(model)

    @torch.no_grad()
    def add(self, name: str, rows: Tensor, *, full_shape: tuple[int, ...], row: int = 0) -> None:
        """Takes over what this rank holds of rows from ``row`` on of a tensor of this shape."""
        if not full_shape:
            # Step counts and the like: where an optimizer wants them on the device, it moves them.
            self.tensors[name] = rows.detach().cpu().clone()
            return
        parameter = name.partition(SEPARATOR)[0]
        place = _place_of(full_shape, self._places.get(parameter))
        if name not in self.tensors:
            self.tensors[name] = _empty_beside(self._parameters[parameter], (place.rows, *full_shape[1:]), rows.dtype)
        copy_rows(self.tensors[name], rows, target_row=place.start, source_row=row)

    def take(self, entry: Entry, rows: Tensor) -> None:
        """The same of what a file holds."""
        self.add(entry.name, rows, full_shape=entry.full_shape, row=entry.row)


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all trained parameters as wholes, in the model's order."""
    places = placements(model)
    return {
        name: places[name].full_shape if name in places else tuple(parameter.shape)
        for name, parameter in local_parameters(model).items()
        if parameter.requires_grad
    }


def check_state_shapes(model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Returns if state of these names and shapes can be cut as the parameters of this run are.

    Raises:
        ValueError: an optimizer that keeps other than a value per weight.
    """
    places = placements(model)
    for name, shape in saved.items():
        place = places.get(name.partition(SEPARATOR)[0])
        if place is not None and shape and shape != place.full_shape:
            raise ValueError(
                f"The checkpoint has {name!r} in the shape {shape} for a parameter of shape {place.full_shape}: such "
                "state cannot be sharded. Resume without --fsdp, or give the checkpoint to --pretrained (weights only)."
            )


def _place_of(full_shape: tuple[int, ...], place: Placement | None) -> Placement:
    if place is None or place.full_shape != full_shape:
        return Placement(full_shape, 0, full_shape[0])
    return place


def _empty_beside(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """State of a weight's shape lies in memory as the weight does: fused optimizers walk through both in step."""
    if tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)
