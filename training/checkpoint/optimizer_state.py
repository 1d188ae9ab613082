"""Names optimizer state by parameter, so that it does not depend on how parameters are grouped or ordered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEPARATOR = "//"


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names in the order in which the optimizer numbers its parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by PARAMETER//STATE on the CPU, the rest in JSON types)."""
    names = parameter_names(optimizer, model)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}{SEPARATOR}{key}"] = value.detach().cpu().contiguous()
            else:
                scalars[f"{names[index]}{SEPARATOR}{key}"] = value
    return tensors, scalars


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Puts packed state back, by name; learning rate, betas and the like stay as the run is configured now.

    Raises:
        ValueError: state of parameters that this optimizer does not have, or the reverse.
    """
    names = parameter_names(optimizer, model)
    state: dict[int, dict[str, Any]] = {}
    number = {name: index for index, name in enumerate(names)}
    for name, key, value in _entries(tensors, scalars):
        if name not in number:
            raise ValueError(
                f"The checkpoint has optimizer state of {name!r}, which is not trained now: resume with the same "
                "--model, --lock-image and --lock-text, or give the checkpoint to --pretrained to use its weights only."
            )
        state.setdefault(number[name], {})[key] = value
    missing = [name for name in names if number[name] not in state]
    if state and missing:
        raise ValueError(
            f"The checkpoint has no optimizer state of {len(missing)} trained parameters (first {missing[0]!r}): "
            "resume with the same --model, --lock-image and --lock-text, or give it to --pretrained (weights only)."
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _entries(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for packed, value in [*tensors.items(), *scalars.items()]:
        name, _, key = packed.partition(SEPARATOR)
        yield name, key, value
