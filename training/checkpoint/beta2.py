"""Carries second moments on under another beta2 than the one they were gathered with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training.optim.optimizer import set_beta2


def carry_beta2(optimizer: torch.optim.Optimizer, saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes restored second moments fit the beta2 that the optimizer has now; call it after they are loaded.

    A moment is kept with its bias of 1 - beta2^step, so under another beta2 it means another value.

    Args:
        saved_groups: the groups' settings in the checkpoint; of optimizers without betas nothing happens.
    """
    saved = {float(group["betas"][1]) for group in saved_groups if group.get("betas")}
    groups = [group for group in optimizer.param_groups if group.get("betas")]
    now = {float(group["betas"][1]) for group in groups}
    if len(saved) != 1 or len(now) != 1:
        return
    for group in groups:
        group["betas"] = (group["betas"][0], *saved)
    set_beta2(optimizer, *now)
