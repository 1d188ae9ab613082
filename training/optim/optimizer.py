"""Builds the optimizer that --opt names: AdamW, StableAdamW, NAdamW, or any of timm's as ``timm/NAME``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from training.config import OptimConfig
from training.distributed.sharding import local_parameters, shard_group, shard_sums
from training.optim.param_groups import build_param_groups
from training.optim.stable_adamw import StableAdamW, bias_correction

logger = logging.getLogger(__name__)

_TIMM = "timm/"
_OWN_NAMES = ("adamw", "stableadamw", "nadamw")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer over what the model trains.

    Args:
        model: the plain model: ``unwrap`` it first, so that parameter names are its own. With FSDP the optimizer gets
            the rows of this rank as plain parameters.

    Raises:
        ValueError: an unknown --opt, values that it needs and does not have, or --opt-kwargs that it does not take.
    """
    name = config.opt.lower()
    try:
        if name.startswith(_TIMM):
            return _build_timm(model, name.removeprefix(_TIMM), config)
        if name in _OWN_NAMES:
            return _build_torch(model, name, config)
    except TypeError as error:
        raise ValueError(f"--opt {config.opt} refused its arguments ({error}): correct --opt-kwargs") from error
    raise ValueError(f"--opt {config.opt}: unknown; give one of {', '.join(_OWN_NAMES)}, or timm/NAME (timm/lion, ...)")


@torch.no_grad()
def set_beta2(optimizer: torch.optim.Optimizer, beta2: float) -> None:
    """Changes beta2 of a running optimizer of Adam's kind; others, which have none, are left alone. No host sync.

    The second moment is kept with its bias, a factor of 1 - beta2^step. Under another beta2 the factor is another, and
    the next updates would be wrong by the root of the ratio: 2.3 times too large after 200 steps of 0.999, on going to
    0.95. So the moment is multiplied by the ratio.
    """
    for group in optimizer.param_groups:
        if "betas" not in group or group["betas"][1] == beta2:
            continue
        before = group["betas"][1]
        group["betas"] = (group["betas"][0], beta2)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state and "step" in state:
                step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
                state["exp_avg_sq"].mul_(bias_correction(step, beta2) / bias_correction(step, before))


def _build_torch(model: nn.Module, name: str, config: OptimConfig) -> torch.optim.Optimizer:
    values = {"--lr": config.lr, "--beta1": config.beta1, "--beta2": config.beta2, "--eps": config.eps}
    if missing := [flag for flag, value in values.items() if value is None]:
        raise ValueError(f"--opt {config.opt} needs {', '.join(missing)}: give a value")
    groups = build_param_groups(local_parameters(model).items(), weight_decay=config.wd, exclude=config.wd_exclude)
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, **config.opt_kwargs}
    if name == "nadamw":
        return torch.optim.NAdam(groups, decoupled_weight_decay=True, **settings)
    if name == "stableadamw":
        return StableAdamW(groups, shard_sums=shard_sums(model), **settings)
    optimizer = _build_adamw(groups, settings)
    # A checkpoint brings the settings of the run that wrote it, and OpenCLIP's are not fused.
    implementation = {key: optimizer.defaults[key] for key in ("fused", "foreach")}
    optimizer.register_load_state_dict_pre_hook(lambda _, state: _with_settings(state, implementation))
    return optimizer


def _build_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.AdamW:
    """Fused where it exists: one kernel that reads and writes each value once, and no wait for the loss scaler."""
    if "fused" in settings or "foreach" in settings:
        return torch.optim.AdamW(groups, **settings)
    try:
        # A copy, because a constructor that fails may have filled in defaults.
        return torch.optim.AdamW([dict(group) for group in groups], fused=True, **settings)
    except RuntimeError as error:
        logger.info("AdamW is not fused here (%s)", error)
        return torch.optim.AdamW(groups, **settings)


def _with_settings(state: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's state dict with some settings of every group replaced."""
    return {**state, "param_groups": [{**group, **settings} for group in state["param_groups"]]}


def _build_timm(model: nn.Module, name: str, config: OptimConfig) -> torch.optim.Optimizer:
    if (config.beta1 is None) != (config.beta2 is None):
        raise ValueError(
            f"--opt {config.opt} with --beta1 {config.beta1} and --beta2 {config.beta2}: give both or neither "
            "(timm's optimizers have defaults of their own)"
        )
    if config.wd_exclude:
        raise ValueError(f"--wd-exclude has no effect with --opt {config.opt}, whose groups timm makes: leave it out")
    settings = dict(config.opt_kwargs)
    if config.beta1 is not None:
        settings["betas"] = (config.beta1, config.beta2)
    if config.momentum is not None:
        settings["momentum"] = config.momentum
    if config.eps is not None:
        settings["eps"] = config.eps
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model if shard_group(model) is None else _LocalModel(model),
            name,
            lr=config.lr,
            weight_decay=config.wd,
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"--opt {config.opt}: {error}; timm.optim.list_optimizers() lists the names") from error
    return optimizer


class _LocalModel(nn.Module):
    """A sharded model as timm's optimizers look at one: parameters by name, here the rows of this rank."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._local = local_parameters(model)
        if hasattr(model, "no_weight_decay"):
            self.no_weight_decay = model.no_weight_decay

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._local.items())
