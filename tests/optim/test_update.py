"""What a run is told about its optimizer's way to leave out bad steps."""

from __future__ import annotations

import pytest
import torch

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
