"""Which parameters are decayed: OpenCLIP 3.3.0's rule, in its order of groups.

The order is part of every checkpoint: optimizer states are stored by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

_NAMES_WITHOUT_DECAY = ("bn", "ln", "bias", "logit_scale")


def is_decayed(name: str, parameter: Tensor, *, exclude: Sequence[str] = ()) -> bool:
    """Matrices and kernels are decayed; gains, biases, the temperature, and names that match a glob are not.

    Positional embeddings have two dimensions and are decayed.
    """
    if parameter.ndim < 2 or any(part in name for part in _NAMES_WITHOUT_DECAY):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in exclude)


def build_param_groups(
    named_parameters: Iterable[tuple[str, Tensor]], *, weight_decay: float, exclude: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Two groups, [without decay, with decay], of what is trained; ``param_names`` runs parallel to ``params``.

    Args:
        exclude: globs over whole parameter names (--wd-exclude).

    Raises:
        ValueError: nothing is trained; a glob that matches no parameter.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter is trained: everything is frozen; leave out --lock-image or --lock-text")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name, _ in trained):
            raise ValueError(
                f"--wd-exclude {pattern} matches no trained parameter; names look like {trained[-1][0]!r}, and a glob "
                "must match the whole name (use * at its ends)"
            )
    groups: list[dict[str, Any]] = [
        {"params": [], "param_names": [], "weight_decay": decay} for decay in (0.0, weight_decay)
    ]
    for name, parameter in trained:
        group = groups[is_decayed(name, parameter, exclude=exclude)]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return groups
