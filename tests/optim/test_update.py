"""What a run is told about its optimizer's way to leave out bad steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_clip import tiny_clip
from training.config import OptimConfig, ResilienceConfig
from training.optim.optimizer import build_optimizer
from training.optim.update import Update
from training.resilience.guard import StepGuard


@pytest.mark.parametrize(
    ("opt", "guard", "said"),
    [("nadamw", "on", True), ("nadamw", "off", False), ("stableadamw", "on", False), ("adamw", "on", False)],
)
def test_an_optimizer_that_makes_the_host_wait_is_named_once(caplog, opt, guard, said):
    model = tiny_clip()
    optimizer = build_optimizer(model, OptimConfig(opt=opt, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6))
    judge = StepGuard(
        ResilienceConfig(guard=guard), device=torch.device("cpu"), rank=0, world_size=1, all_reduce_sum=torch.clone
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Update(model, optimizer=optimizer, scaler=scaler, grad_clip_norm=None, guard=judge)
    told = [record.getMessage() for record in caplog.records]
    assert [("the host waits for the device at every step" in text) for text in told] == [True] * said


class Launches(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def launches_of_an_update(parameters: int) -> list[str]:
    model = nn.ParameterDict({str(number): nn.Parameter(torch.ones(3, 3)) for number in range(parameters)})
    model.logit_scale = nn.Parameter(torch.ones(()))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    update = Update(model, optimizer=optimizer, scaler=scaler, grad_clip_norm=0.5, guard=None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update(loss=torch.ones(()), features=torch.ones(()))  # the first one creates states
    with Launches() as launches:
        update(loss=torch.ones(()), features=torch.ones(()))
    return launches.names


def test_norm_clipping_and_adamw_are_a_few_launches_however_many_parameters_there_are():
    few, many = launches_of_an_update(3), launches_of_an_update(30)
    assert {"aten::_foreach_norm.Scalar", "aten::_foreach_mul_.Tensor", "aten::_fused_adamw_"} <= set(many)
    assert len([name for name in many if "detach" not in name]) == len([name for name in few if "detach" not in name])
