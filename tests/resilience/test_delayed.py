"""Vitals reach the host a fixed number of steps later, in order, and none is lost."""

from __future__ import annotations

import pytest
import torch

from training.resilience.delayed import LAG, DelayedVitals
from training.resilience.guard import VITALS, Vitals


def vitals(number: int, device: str = "cpu") -> torch.Tensor:
    return torch.full((len(VITALS),), float(number), device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_ready_depends_on_the_number_of_steps_alone(device):
    delayed = DelayedVitals()
    seen = []
    for step in range(5):
        delayed.push(step, vitals(step, device))
        seen.append([(place, found.loss) for place, found in delayed.ready()])
    assert seen == [[], [], [(0, 0.0)], [(1, 1.0)], [(2, 2.0)]]
    assert [place for place, _ in delayed.drain()] == [3, 4]
    assert delayed.drain() == delayed.ready() == []


def test_what_was_not_asked_for_in_time_is_not_lost():
    delayed = DelayedVitals(lag=1)
    for step in range(4):
        delayed.push(step, vitals(step))
    assert [step for step, _ in delayed.ready()] == [0, 1, 2]


def test_the_lag_of_a_run_is_two_steps():
    assert LAG == 2


def test_numbers_stand_under_their_names():
    delayed = DelayedVitals(lag=0)
    delayed.push(7, torch.arange(len(VITALS), dtype=torch.float32))
    assert delayed.ready() == [(7, Vitals(*range(len(VITALS))))]
