"""Brings weights and optimizer state that one rank has read as wholes to all ranks, one tensor at a time.

    rank 0:  a .pt file in OpenCLIP's layout, or a step checkpoint's weights -> names, shapes, small values -> all ranks
             tensor by tensor -> all ranks, each of which takes over what it holds

The other ranks read nothing: eight of a node would need eight times the memory. Every function is a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from models.clip import Clip
from models.weights import adapt_state_dict
from training.checkpoint.checkpointer import read_step_checkpoint
from training.checkpoint.export import OpenClipCheckpoint, read_epoch_file
from training.checkpoint.rows import WeightRows
from training.distributed.collectives import broadcast_tensor
from training.distributed.runtime import Runtime
from training.distributed.sharding import placements
from training.distributed.start_up import on_first_rank

Value = TypeVar("Value")


class SentEpochFile(NamedTuple):
    """A ``.pt`` file: on rank 0 with its tensors, elsewhere with tensors without values (of the device "meta")."""

    epoch: int
    weights: Mapping[str, Tensor]
    """In the model's layout."""
    names: list[str]
    """Of the weights as the file has them, in its order."""
    optimizer: Mapping[str, Any] | None
    scaler: Mapping[str, Any] | None


def agree_on_epoch_file(path: str, model: Clip, *, runtime: Runtime) -> SentEpochFile:
    """Rank 0 reads; all ranks know what is to come.

    Raises:
        ValueError: not a readable checkpoint, or of another model; on all ranks.
    """
    own: list[SentEpochFile] = []

    def read() -> SentEpochFile:
        file: OpenClipCheckpoint = read_epoch_file(path)
        weights = adapt_state_dict(model, dict(file.state_dict))
        own.append(SentEpochFile(file.epoch, weights, list(file.state_dict), file.optimizer, file.scaler))
        return own[0]._replace(weights=_without_values(weights), optimizer=_without_values(file.optimizer))

    sent = on_first_rank(read, rank=runtime.rank)  # collective: all ranks
    check_shapes({name: tuple(tensor.shape) for name, tensor in sent.weights.items()}, model)
    return own[0] if own else sent


def restore_weights(path: str, model: Clip, *, runtime: Runtime) -> int:
    """Loads the weights of a step checkpoint or a ``.pt`` file; returns completed epochs, as far as it tells.

    Raises:
        ValueError: not a readable checkpoint, or of another model. DamagedCheckpoint: not what was written. On all
            ranks.
    """
    own: list[Mapping[str, Tensor]] = []

    def read() -> tuple[int, dict[str, Tensor]]:
        if path.endswith(".pt"):
            file = read_epoch_file(path)
            epoch, weights = file.epoch, dict(file.state_dict)
        else:
            step = read_step_checkpoint(Path(path))
            epoch, weights = int(step.train["epoch"]), dict(step.model)
        own.append(adapt_state_dict(model, weights))
        return epoch, _without_values(dict(own[0]))

    epoch, weights = on_first_rank(read, rank=runtime.rank)  # collective: all ranks
    check_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, model)
    send_weights(own[0] if own else weights, model, runtime=runtime)  # collective: all ranks
    return epoch


def send_weights(weights: Mapping[str, Tensor], model: Clip, *, runtime: Runtime) -> None:
    """Puts rank 0's weights into the model on all ranks: of each tensor the rows that a rank holds."""
    rows = WeightRows(model)
    for name, tensor in weights.items():
        rows.add(name, send(tensor, runtime=runtime))  # collective: all ranks


def send(tensor: Tensor, *, runtime: Runtime) -> Tensor:
    """Rank 0's tensor, on the device of every rank."""
    if runtime.is_main:
        whole = tensor.detach().to(runtime.device).contiguous()
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=runtime.device)
    return broadcast_tensor(whole, 0)  # collective: all ranks


def check_shapes(saved: Mapping[str, tuple[int, ...]], model: Clip) -> None:
    """Returns if weights of these names and shapes, as wholes, are those of the model.

    Raises:
        ValueError: they are not.
    """
    expected = whole_shapes(model)
    differing = [name for name in {**expected, **saved} if expected.get(name) != saved.get(name)]
    if differing:
        # A tensor that both have tells more than one that is missing.
        name = next((name for name in differing if name in expected and name in saved), differing[0])
        raise ValueError(
            f"the weights do not fit model '{model.config.name}': {len(differing)} of {len(expected)} tensors differ "
            f"(first: {name}, saved {saved.get(name, 'not at all')}, now {expected.get(name, 'not at all')}); pass the "
            "--model that the checkpoint was trained with (and its --force-* flags)"
        )


def whole_shapes(model: Clip) -> dict[str, tuple[int, ...]]:
    """Of all weights and buffers."""
    places = placements(model)
    return {
        name: places[name].full_shape if name in places else tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }


def _without_values(content: Value) -> Value:
    """The same with tensors that have no memory, but for single numbers."""
    return cast(Value, _strip(content))


def _strip(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.detach().clone() if content.numel() <= 1 else content.detach().to("meta")
    if isinstance(content, Mapping):
        return {key: _strip(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(_strip, content))
    return content
