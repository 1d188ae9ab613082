"""The learning rate of every step, as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from training.config import ScheduleConfig

Schedule = Callable[[int], float]

_NAMES = ("cosine", "const", "const-cooldown")


def build_schedule(config: ScheduleConfig, *, lr: float, steps_per_epoch: float) -> Schedule:
    """step (from 0) -> learning rate of that step.

    Args:
        steps_per_epoch: a fraction where the data have changed; only the length of the run is rounded.

    Raises:
        ValueError: an unknown --lr-scheduler, or const-cooldown without --epochs-cooldown.
    """
    if config.lr_scheduler not in _NAMES:
        raise ValueError(f"--lr-scheduler {config.lr_scheduler}: unknown; give one of {', '.join(_NAMES)}")
    if config.skip_scheduler:
        return lambda step: lr
    after_warmup = _build_after_warmup(config, lr=lr, steps_per_epoch=steps_per_epoch)

    def schedule(step: int) -> float:
        return lr * (step + 1) / config.warmup if step < config.warmup else after_warmup(step)

    return schedule


def _build_after_warmup(config: ScheduleConfig, *, lr: float, steps_per_epoch: float) -> Schedule:
    total = round(steps_per_epoch * config.epochs)
    if config.lr_scheduler == "cosine":
        # Half a cosine from lr to almost 0; 0 itself would be the step after the last.
        length = max(1, total - config.warmup)
        return lambda step: 0.5 * (1 + math.cos(math.pi * min(step - config.warmup, length) / length)) * lr
    if config.lr_scheduler == "const":
        return lambda step: lr
    if config.epochs_cooldown is None:
        raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown: give the number of epochs it lasts")
    start = total - round(steps_per_epoch * config.epochs_cooldown)
    end, power = config.lr_cooldown_end, config.lr_cooldown_power

    def cooldown(step: int) -> float:
        if step < start:
            return lr
        done = min(1.0, (step - start) / max(1, total - start))
        remaining: float = (1 - done) ** power
        return remaining * (lr - end) + end

    return cooldown
