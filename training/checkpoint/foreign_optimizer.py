"""Takes over the optimizer state of OpenCLIP's checkpoints: 3.3.0's, HEAD's, and our own exports.

They number the parameters in the order of their groups, and say nowhere which is which:

    3.3.0     [not decayed, decayed]; not decayed: fewer than 2 dimensions, or bn, ln, bias, logit_scale in the name
    HEAD      in the order in which the groups are met; not decayed: fewer than 2 dimensions, positional embeddings and
              the like, --wd-exclude. Groups have a ``group_name``
    timm's    [not decayed, decayed]; not decayed: fewer than 2 dimensions, or .bias at the end of the name
    named     the groups name their parameters (our exports), or the state is keyed by name (HEAD under FSDP)

So every rule is tried, and taken if the groups come out with the right sizes and all moments with the right shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoint.beta2 import carry_beta2
from training.checkpoint.optimizer_state import SEPARATOR, unpack_optimizer
from training.checkpoint.rows import StateRows, full_shapes
from training.distributed.sharding import local_parameters
from training.optim.param_groups import is_decayed
from training.optim.stable_adamw import StableAdamW

Shapes = Mapping[str, tuple[int, ...]]
"""Of the trained parameters, in the model's order."""

_NEEDED: Sequence[tuple[type[torch.optim.Optimizer], frozenset[str]]] = (
    (torch.optim.NAdam, frozenset({"step", "exp_avg", "exp_avg_sq", "mu_product"})),
    (torch.optim.AdamW, frozenset({"step", "exp_avg", "exp_avg_sq"})),
    (StableAdamW, frozenset({"step", "exp_avg", "exp_avg_sq"})),
)
_WRAPPERS = ("module.", "_orig_mod.")
# What the towers of OpenCLIP's HEAD declare beside what has one dimension.
_HEAD_UNDECAYED = ("positional_embedding", "class_embedding", "cls_emb")
_HEAD_TOWERS = ("", "visual.", "text.")


def load_foreign_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Mapping[str, Any],
    *,
    weights: Collection[str] = (),
    path: str,
    share: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Puts the state of ``saved``, an ``Optimizer.state_dict`` of OpenCLIP's, in its place, whatever our groups are.

    Learning rate, weight decay and the like stay as the run is configured now. With FSDP each rank takes its rows.

    Args:
        weights: names of the file's weights in its order, which is that of the parameters there.
        share: gives a tensor that only the rank which has read the file holds to all ranks, in the same order on all;
            elsewhere ``saved`` has tensors without values in their place (``torch.device("meta")``).

    Raises:
        ValueError: it is of other parameters, of another grouping, or of another optimizer; nothing is changed then.
    """
    shapes = full_shapes(model)
    if shapes.keys() <= set(weights):
        shapes = {name: shapes[name] for name in weights if name in shapes}
    undecayed = {
        name for group in optimizer.param_groups for name in _names_of(group, model) if not group.get("weight_decay")
    }
    state = name_state(saved, shapes, declared=declared_undecayed(model), undecayed=undecayed, path=path)
    _check_kind(optimizer, state, path=path)
    optimizer.state.clear()  # what is read now takes its place in memory
    rows = StateRows(model)
    for name, values in state.items():
        for key, value in values.items():
            whole = value if value.ndim == 0 else share(value)
            rows.add(f"{name}{SEPARATOR}{key}", whole, full_shape=tuple(value.shape))
    unpack_optimizer(optimizer, model, rows.tensors, {})
    carry_beta2(optimizer, saved["param_groups"])


def name_state(
    saved: Mapping[str, Any],
    shapes: Shapes,
    *,
    declared: Collection[str] = (),
    undecayed: Collection[str] = (),
    path: str,
) -> dict[str, dict[str, Tensor]]:
    """The state by parameter name. Pure.

    Args:
        declared: parameters that the model itself wants undecayed (``declared_undecayed``).
        undecayed: parameters that this run does not decay: what --wd-exclude may have meant there as well.

    Raises:
        ValueError: no rule explains the groups.
    """
    groups = _groups(saved, path=path)
    names = _given_names(groups)
    if names is not None:
        return _by_name(saved, names, shapes, path=path)
    for layout in _layouts(groups, shapes, declared=declared, undecayed=undecayed):
        state = _fit(saved, groups, layout, shapes)
        if state is not None:
            return state
    raise ValueError(_mismatch(groups, shapes, path=path))


def declared_undecayed(model: nn.Module) -> set[str]:
    """Parameters that modules of the model (timm's trunks) declare to be undecayed, as HEAD collects them."""
    declared: set[str] = set()
    for prefix, module in model.named_modules():
        declare: Callable[[], Collection[str]] | None = getattr(module, "no_weight_decay", None)
        if callable(declare):
            declared |= {f"{prefix}.{name}".removeprefix(".") for name in declare()}
    return declared


def _groups(saved: Mapping[str, Any], *, path: str) -> list[Mapping[str, Any]]:
    groups = saved.get("param_groups")
    if not isinstance(groups, Sequence) or not isinstance(saved.get("state"), Mapping) or not groups:
        raise ValueError(f"{path!r} holds no optimizer state: its 'optimizer' has no 'state' and 'param_groups'.")
    return list(groups)


def _given_names(groups: Sequence[Mapping[str, Any]]) -> dict[Any, str] | None:
    """{key in the state: parameter name}, where the file itself says it."""
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return {key: _unwrapped(key) for group in groups for key in group["params"]}
    if all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        pairs = [pair for group in groups for pair in zip(group["params"], group["param_names"], strict=True)]
        return {key: _unwrapped(name) for key, name in pairs}
    return None


def _by_name(
    saved: Mapping[str, Any], names: Mapping[Any, str], shapes: Shapes, *, path: str
) -> dict[str, dict[str, Tensor]]:
    unknown = [name for name in names.values() if name not in shapes]
    missing = [name for name in shapes if name not in names.values()]
    if unknown or missing:
        shown = f"{len(unknown)} are not trained here (first {unknown[0]!r})" if unknown else ""
        lacking = f"{len(missing)} trained here have none (first {missing[0]!r})" if missing else ""
        raise ValueError(
            f"{path!r} has optimizer state of other parameters: {'; '.join(filter(None, (shown, lacking)))}. Resume "
            "with the same --model, --lock-image and --lock-text, or give it to --pretrained to start from its weights."
        )
    state = {}
    for key, name in names.items():
        values = _shaped(saved["state"].get(key, {}), shapes[name])
        if values is None:
            raise ValueError(f"{path!r} has optimizer state of {name!r} in another shape than {shapes[name]}.")
        state[name] = values
    return {name: values for name, values in state.items() if values}


def _layouts(
    groups: Sequence[Mapping[str, Any]], shapes: Shapes, *, declared: Collection[str], undecayed: Collection[str]
) -> Iterator[list[list[str]]]:
    """Names by group, by every rule that may have made the groups; the likeliest first."""
    one_dimensional = {name for name, shape in shapes.items() if len(shape) < 2}
    native = {tower + name for tower in _HEAD_TOWERS for name in _HEAD_UNDECAYED}
    head = one_dimensional | native.union(declared)
    ours = {name for name, shape in shapes.items() if not is_decayed(name, torch.empty(shape, device="meta"))}
    biases = {name for name in shapes if name.endswith(".bias")}
    if any("group_name" in group for group in groups):
        for spared in (head, head.union(undecayed)):
            yield _as_met(shapes, spared)
        return
    for spared in (ours, ours.union(undecayed), one_dimensional | biases, one_dimensional | biases | head):
        yield _split(shapes, spared)
    yield [list(shapes)]


def _split(shapes: Shapes, spared: Collection[str]) -> list[list[str]]:
    return [[name for name in shapes if name in spared], [name for name in shapes if name not in spared]]


def _as_met(shapes: Shapes, spared: Collection[str]) -> list[list[str]]:
    first = next(iter(shapes)) in spared
    groups = _split(shapes, spared)
    return [group for group in (groups if first else groups[::-1]) if group]


def _fit(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], layout: Sequence[Sequence[str]], shapes: Shapes
) -> dict[str, dict[str, Tensor]] | None:
    """The state by name if the groups are laid out like this."""
    if [len(group["params"]) for group in groups] != [len(names) for names in layout]:
        return None
    state = {}
    for group, names in zip(groups, layout, strict=True):
        for key, name in zip(group["params"], names, strict=True):
            values = _shaped(saved["state"].get(key, {}), shapes[name])
            if values is None:
                return None
            if values:
                state[name] = values
    return state


def _shaped(values: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor] | None:
    """As tensors in the parameter's shape; None if one is of another. Scalars, such as step counts, stay scalars.

    FSDP gives a scalar parameter, such as the logit scale, one dimension.
    """
    shaped = {}
    for key, value in values.items():
        tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
        if tensor.ndim > 0 and tuple(tensor.shape) != shape:
            if tensor.numel() != 1 or shape not in ((), (1,)):
                return None
            tensor = tensor.reshape(shape)
        shaped[key] = tensor
    return shaped


def _check_kind(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]], *, path: str) -> None:
    needed = next((keys for kind, keys in _NEEDED if isinstance(optimizer, kind)), None)
    found = next((frozenset(values) for values in state.values()), None)
    if needed is not None and found is not None and not needed <= found:
        raise ValueError(
            f"{path!r} was trained with another optimizer: its state is {', '.join(sorted(found))}, and "
            f"{type(optimizer).__name__} needs {', '.join(sorted(needed))}. Pass the --opt it was trained with, or "
            "give it to --pretrained to start from its weights."
        )


def _mismatch(groups: Sequence[Mapping[str, Any]], shapes: Shapes, *, path: str) -> str:
    sizes = [len(group["params"]) for group in groups]
    if sum(sizes) != len(shapes):
        cause = f"{sum(sizes)} parameters were trained there, {len(shapes)} are here"
        remedy = "resume with the same --model, --lock-image and --lock-text"
    elif any(float(group.get("lr_scale", 1.0)) != 1.0 for group in groups):
        cause = "its groups have learning rates of their own (layer decay), which is not supported"
        remedy = "finish that run with OpenCLIP"
    else:
        cause = f"its groups of {sizes} parameters are neither 3.3.0's, nor HEAD's, nor timm's"
        remedy = "pass the --wd-exclude it was trained with"
    return (
        f"{path!r} has an optimizer state that does not fit: {cause}. Either {remedy}, or give it to --pretrained to "
        "start from its weights."
    )


def _names_of(group: Mapping[str, Any], model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in local_parameters(model).items()}
    return [names[parameter] for parameter in group["params"]]


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
