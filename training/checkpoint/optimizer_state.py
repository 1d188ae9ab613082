"""Names optimizer state by parameter, so that it does not depend on how parameters are grouped or ordered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed.sharding import local_parameters

SEPARATOR = "//"


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names in the order in which the optimizer numbers its parameters."""
    names = {parameter: name for name, parameter in local_parameters(model).items()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the optimizer's own tensors by PARAMETER//STATE, not copied; the rest in JSON types)."""
    names = parameter_names(optimizer, model)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}{SEPARATOR}{key}"] = value.detach()
            else:
                scalars[f"{names[index]}{SEPARATOR}{key}"] = value
    return tensors, scalars


def pack_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The settings of every group in JSON types, with the names of its parameters in order."""
    names = {parameter: name for name, parameter in local_parameters(model).items()}
    return [
        {"names": [names[parameter] for parameter in group["params"]]}
        | {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        | ({"has_param_names": True} if "param_names" in group else {})
        for group in optimizer.param_groups
    ]


def unpack_groups(packed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as ``Optimizer.state_dict`` has them: parameters numbered in order."""
    groups, first = [], 0
    for entry in packed:
        names = list(entry["names"])
        # JSON has no tuples; of what optimizers keep in groups only the names are a list.
        group = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry.items()
            if key not in ("names", "has_param_names")
        }
        if entry.get("has_param_names"):
            group["param_names"] = names
        group["params"] = list(range(first, first + len(names)))
        first += len(names)
        groups.append(group)
    return groups


def check_optimizer_names(optimizer: torch.optim.Optimizer, model: nn.Module, packed: Iterable[str]) -> None:
    """Returns if state under these names (PARAMETER//STATE) is that of the optimizer's parameters.

    Raises:
        ValueError: state of parameters that this optimizer does not have, or the reverse.
    """
    names = parameter_names(optimizer, model)
    known = set(names)
    saved = {entry.partition(SEPARATOR)[0]: None for entry in packed}  # in order
    for name in saved:
        if name not in known:
            raise ValueError(
                f"The checkpoint has optimizer state of {name!r}, which is not trained now: resume with the same "
                "--model, --lock-image and --lock-text, or give the checkpoint to --pretrained to use its weights only."
            )
    missing = [name for name in names if name not in saved]
    if saved and missing:
        raise ValueError(
            f"The checkpoint has no optimizer state of {len(missing)} trained parameters (first {missing[0]!r}): "
            "resume with the same --model, --lock-image and --lock-text, or give it to --pretrained (weights only)."
        )


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Puts packed state back, by name; learning rate, betas and the like stay as the run is configured now.

    Tensors that are of the right type and on the right device are taken over, not copied.

    Raises:
        ValueError: state of parameters that this optimizer does not have, or the reverse.
    """
    check_optimizer_names(optimizer, model, [*tensors, *scalars])
    number = {name: index for index, name in enumerate(parameter_names(optimizer, model))}
    state: dict[int, dict[str, Any]] = {}
    for name, key, value in split_names(tensors, scalars):
        state.setdefault(number[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def split_names(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(parameter, state, value) of packed state."""
    for packed, value in [*tensors.items(), *scalars.items()]:
        name, _, key = packed.partition(SEPARATOR)
        yield name, key, value


def _plain(value: Any) -> Any:
    """In JSON types: a learning rate may be a tensor."""
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
