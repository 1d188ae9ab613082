"""Brings the image tower's position embeddings to another grid while a checkpoint is read, and their moments with them.

    saved [prefix + h*w, D] --all rows on every rank--> resized by rank 0 --> the rows that each rank holds

Weights and first moments are resized as OpenCLIP and timm resize foreign weights, bicubic with antialiasing, which can
overshoot. What is nowhere negative, the second moments above all, is resized bilinearly, and stays so. A prefix (class
token, registers) has no place in the grid and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from models.clip import Clip
from models.weights import resize_grid
from training.checkpoint.epoch_loading import send
from training.checkpoint.optimizer_state import SEPARATOR
from training.checkpoint.pieces import copy_rows
from training.checkpoint.rows import StateRows, WeightRows
from training.checkpoint.tensor_file import Entry
from training.distributed.runtime import Runtime

Shape = tuple[int, ...]
Grid = tuple[int, int]
Take = Callable[[Entry, Tensor], None]


class PositionTable(NamedTuple):
    """A tensor with one row for each patch of an image, behind its prefix."""

    name: str
    shape: Shape
    """[N, D], or [1, N, D] as timm has it."""
    grid: Grid
    is_computed: bool
    """From the grid, and not trained: a model of another size has its own."""

    @property
    def prefix(self) -> int:
        """Rows that belong to no patch."""
        return self.shape[-2] - prod(self.grid)


class Resizing(NamedTuple):
    """What becomes of a table."""

    table: PositionTable
    saved: Shape
    old: Grid

    def __call__(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape ``saved`` -> one of the model's."""
        prefix = self.table.prefix
        rows = tensor.reshape(-1, tensor.shape[-1])  # [1, N, D] -> [N, D]
        mode = "bilinear" if bool((rows >= 0).all()) else "bicubic"
        places = resize_grid(rows[prefix:], old=self.old, new=self.table.grid, mode=mode)
        return torch.cat([rows[:prefix], places]).reshape(self.table.shape)


def position_table(model: Clip, shapes: Mapping[str, Shape]) -> PositionTable | None:
    """That of the image tower; None if it has none that is known here.

    Args:
        shapes: of the model's tensors as wholes.
    """
    visual: Any = model.visual
    trunk = getattr(visual, "trunk", None)
    grids = {
        "visual.positional_embedding": getattr(visual, "grid_size", None),
        "visual.attnpool.positional_embedding": tuple(size // 32 for size in model.config.vision_cfg.image_hw),
        "visual.trunk.pos_embed": getattr(getattr(trunk, "patch_embed", None), "grid_size", None),
    }
    for name, grid in grids.items():
        shape = shapes.get(name)
        if shape is None or grid is None or len(shape) < 2 or prod(shape[:-2]) != 1 or shape[-2] < prod(grid):
            continue
        computed = name == "visual.positional_embedding" and model.config.vision_cfg.pos_embed_type != "learnable"
        return PositionTable(name, shape, cast(Grid, tuple(grid)), computed)
    return None


def find_resizing(
    model: Clip, shapes: Mapping[str, Shape], saved: Mapping[str, Shape], *, image_hw: Grid | None
) -> Resizing | None:
    """What the table of a checkpoint needs to fit the model; None if it fits, or if that is not all that differs.

    Args:
        shapes: of the model's tensors as wholes; ``saved``: the checkpoint's.
        image_hw: that the checkpoint was trained with; None where it does not say.

    Raises:
        ValueError: it does not say, and its table is of another size: 64 places may be 8 x 8 as well as 16 x 4.
    """
    table = position_table(model, shapes)
    if table is None or table.name not in saved or image_hw == model.config.vision_cfg.image_hw:
        return None
    before = saved[table.name]
    if len(before) != len(table.shape) or before[-1] != table.shape[-1]:
        return None
    if image_hw is None:
        if before == table.shape:
            return None
        raise ValueError(
            f"the checkpoint has {before[-2]} position embeddings, the model {table.shape[-2]}, and of what image size "
            "the first are is not known: it was written by an earlier version, with a model that is not found any "
            "more. Give its model file the name that it had, or keep the image size"
        )
    height, width = model.config.vision_cfg.image_hw
    old = (image_hw[0] * table.grid[0] // height, image_hw[1] * table.grid[1] // width)
    fits = old != table.grid and prod(old) == before[-2] - table.prefix
    return Resizing(table, before, old) if fits else None


class ResizedRows:
    """Takes what is read of a checkpoint: all rows of what is to be resized, and hands on everything else."""

    def __init__(self, resizing: Resizing | None, moments: Mapping[str, Shape]) -> None:
        """
        Args:
            moments: shapes of the optimizer's state by PARAMETER//STATE.

        Raises:
            ValueError: state of the table that has not a value for each of its weights.
        """
        self._resizing = resizing
        self._shapes: dict[str, Shape] = {}
        self._wholes: dict[str, Tensor] = {}
        if resizing is None:
            return
        name, saved = resizing.table.name, resizing.saved
        own = {key: shape for key, shape in moments.items() if key.partition(SEPARATOR)[0] == name and shape}
        for key, shape in own.items():
            if shape != saved:
                raise ValueError(
                    f"the optimizer keeps {key!r} in the shape {shape} for position embeddings of {saved}, which "
                    "cannot be resized: pass --opt adamw, or keep the image size"
                )
        self._shapes = {name: resizing.table.shape} | dict.fromkeys(own, resizing.table.shape)

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors that are resized."""
        return list(self._shapes)

    def fitted(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of a checkpoint's tensors after this."""
        return {name: self._shapes.get(name, shape) for name, shape in shapes.items()}

    def before(self, take: Take) -> Take:
        """Gets tensors in the place of ``take``, which gets those that stay as they are."""

        def take_or_keep(entry: Entry, rows: Tensor) -> None:
            if entry.name not in self._shapes:
                take(entry, rows)
                return
            if entry.name not in self._wholes:
                self._wholes[entry.name] = torch.empty(entry.full_shape, dtype=entry.dtype)
            copy_rows(self._wholes[entry.name], rows.cpu(), source_row=entry.row)

        return take_or_keep

    def put(self, weights: WeightRows, optimizer: StateRows, *, runtime: Runtime) -> None:
        """Resizes what was kept, on rank 0: other processors may round otherwise. Collective: all ranks."""
        resizing = self._resizing
        if resizing is None:
            return
        for name in self.names:
            whole = send(resizing(self._wholes.pop(name)), runtime=runtime)  # collective: all ranks
            if SEPARATOR in name:
                optimizer.add(name, whole, full_shape=resizing.table.shape)
            elif not resizing.table.is_computed:
                weights.add(name, whole)
