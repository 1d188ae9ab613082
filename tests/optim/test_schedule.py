"""Learning rates equal OpenCLIP's at every step."""

from __future__ import annotations

import pytest
import torch
from open_clip_train import scheduler

from training.config import ScheduleConfig
from training.optim.schedule import build_schedule

LR, STEPS_PER_EPOCH, EPOCHS = 3e-4, 7, 9
TOTAL = STEPS_PER_EPOCH * EPOCHS


def reference(name: str, warmup: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    build = {"cosine": scheduler.cosine_lr, "const": scheduler.const_lr, "const-cooldown": scheduler.const_lr_cooldown}
    adjust = build[name](optimizer, LR, warmup, TOTAL, **options)
    return [adjust(step) for step in range(TOTAL)]


def ours(**fields: object) -> list[float]:
    schedule = build_schedule(ScheduleConfig(epochs=EPOCHS, **fields), lr=LR, steps_per_epoch=STEPS_PER_EPOCH)
    return [schedule(step) for step in range(TOTAL)]


@pytest.mark.parametrize("warmup", [0, 1, 10, TOTAL, 10 * TOTAL])
@pytest.mark.parametrize("name", ["cosine", "const"])
def test_every_step_has_open_clips_learning_rate(name, warmup):
    assert ours(lr_scheduler=name, warmup=warmup) == reference(name, warmup)


@pytest.mark.parametrize(("epochs", "end", "power"), [(2, 0.0, 1.0), (3, 1e-5, 0.5), (EPOCHS, 0.0, 2.0), (0, 0.0, 1.0)])
def test_every_step_of_a_cooldown_has_open_clips_learning_rate(epochs, end, power):
    found = ours(
        lr_scheduler="const-cooldown", warmup=5, epochs_cooldown=epochs, lr_cooldown_end=end, lr_cooldown_power=power
    )
    assert found == reference(
        "const-cooldown",
        5,
        cooldown_steps=epochs * STEPS_PER_EPOCH,
        cooldown_power=power,
        cooldown_end_lr=end,
    )


def test_skipping_the_scheduler_skips_warmup_too():
    assert set(ours(skip_scheduler=True, warmup=10)) == {LR}


def test_the_step_after_the_last_is_zero_and_stays_there():
    schedule = build_schedule(ScheduleConfig(epochs=EPOCHS, warmup=3), lr=LR, steps_per_epoch=STEPS_PER_EPOCH)
    assert schedule(TOTAL) == schedule(2 * TOTAL) == 0.0


def test_cooldown_without_its_length_is_refused():
    with pytest.raises(ValueError, match="const-cooldown needs --epochs-cooldown"):
        ours(lr_scheduler="const-cooldown")


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="--lr-scheduler linear: unknown; give one of cosine, const, const-cooldown"):
        ours(lr_scheduler="linear")
