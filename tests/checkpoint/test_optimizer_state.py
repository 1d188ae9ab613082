from __future__ import annotations

import pytest
import torch
from torch import nn

from training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer


def _stepped(names: list[list[str]], model: nn.Module, *, lr: float = 0.1) -> torch.optim.Optimizer:
    """AdamW over groups of named parameters, after one step with gradients."""
    parameters = dict(model.named_parameters())
    groups = [{"params": [parameters[name] for name in group]} for group in names]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for index, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    return optimizer


def test_state_follows_the_name_through_another_grouping() -> None:
    torch.manual_seed(0)
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    source = _stepped([["weight"], ["bias"]], old)
    target = _stepped([["bias", "weight"]], new, lr=0.7)
    unpack_optimizer(target, new, *pack_optimizer(source, old))
    packed, _ = pack_optimizer(target, new)
    expected, _ = pack_optimizer(source, old)
    assert set(packed) == set(expected)
    assert all(torch.equal(packed[key], expected[key]) for key in expected)
    assert target.param_groups[0]["lr"] == 0.7


def test_state_of_a_parameter_that_is_not_trained_is_refused() -> None:
    model = nn.Linear(3, 2)
    packed = pack_optimizer(_stepped([["weight"], ["bias"]], model), model)
    with pytest.raises(ValueError, match=r"state of 'bias', which is not trained now.*--lock-image"):
        unpack_optimizer(_stepped([["weight"]], model), model, *packed)


def test_missing_state_of_a_trained_parameter_is_refused() -> None:
    model = nn.Linear(3, 2)
    packed = pack_optimizer(_stepped([["weight"]], model), model)
    with pytest.raises(ValueError, match=r"no optimizer state of 1 trained parameters \(first 'bias'\)"):
        unpack_optimizer(_stepped([["weight"], ["bias"]], model), model, *packed)
