"""A bad step changes nothing on any rank, and healthy runs are left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed.launch import run_ranks
from tests.resilience.faulty_steps import BATCH_FAULTS, CPU, FAULTY_STEP, Outcome, build_guard, run_with_fault
from training.config import ResilienceConfig
from training.resilience.guard import LOSS_STD_FLOOR, STATISTICS, VITALS, Request, StepGuard, Vitals
from training.resilience.replicas import differing_tensors

ARMS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "stableadamw": {"opt": "stableadamw"},
    "read by the host": {"opt": "timm/lion"},
    "accumulated": {"accum_freq": 2},
    "fp16": {"precision": "amp"},
    "off": {"guard": "off"},
}
FAULTS_BY_ARM = {arm: BATCH_FAULTS if arm in ("adamw", "off") else BATCH_FAULTS[::3] for arm in ARMS} | {
    "fp16": ["NaN pixel", "NaN gradient after the reduction"]
}


def all_outcomes() -> dict[tuple[str, str | None], Outcome]:
    outcomes = {
        (arm, fault): run_with_fault(fault, **options)
        for arm, options in ARMS.items()
        for fault in (None, *FAULTS_BY_ARM[arm])
    }
    for guard in ("on", "off"):
        outcomes[f"overflow, guard {guard}", None] = run_with_fault("overflow", precision="amp", guard=guard)
    return outcomes


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str | None], Outcome]]:
    return run_ranks(2, all_outcomes)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


GUARDED = [(arm, fault) for arm in ARMS for fault in FAULTS_BY_ARM[arm] if arm != "off"]


@pytest.mark.parametrize(("arm", "fault"), GUARDED)
def test_a_bad_step_leaves_every_rank_as_if_it_had_not_seen_the_batch(arm, fault, two_ranks):
    first, second = (outcomes[arm, fault] for outcomes in two_ranks)
    reference = two_ranks[0][arm, None]
    assert all(torch.isfinite(value).all() for value in reference.model.values())
    assert_equal(first.all_state, reference.all_state)  # weights, running statistics, moments, step counters, guard
    assert_equal(second.all_state[1:], reference.all_state[1:])
    assert_equal(second.model, two_ranks[1][arm, None].model)
    assert [place for place, vitals in enumerate(first.vitals) if vitals.bad] == [FAULTY_STEP]
    assert first.scale == second.scale


@pytest.mark.parametrize("fault", BATCH_FAULTS)
def test_without_the_guard_the_same_fault_changes_the_run(fault, two_ranks):
    outcome, reference = two_ranks[1]["off", fault], two_ranks[1]["off", None]
    different = [name for name, value in outcome.model.items() if not torch.equal(value, reference.model[name])]
    assert len(different) > 5
    assert outcome.vitals[FAULTY_STEP].bad  # measured all the same


def test_without_the_guard_a_broken_rank_becomes_another_model(two_ranks):
    first, second = (outcomes["off", "gradient x 1e4 after the reduction"].model for outcomes in two_ranks)
    assert not all(torch.equal(value, second[name]) for name, value in first.items() if "running" not in name)


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        ("NaN pixel", 1),
        ("NaN gradient after the reduction", 1),
        ("gradient x 1e4 after the reduction", 1),
        ("NaN temperature", -1),
        ("gradient x 1e4 before the reduction", -1),
    ],
)
def test_a_fault_of_one_rank_is_named_where_it_can_be_told(fault, rank, two_ranks):
    found = {outcomes["adamw", fault].vitals[FAULTY_STEP] for outcomes in two_ranks}
    assert len({str(vitals) for vitals in found}) == 1  # the same on all ranks
    assert {vitals.flagged_rank for vitals in found} == {rank}


def test_an_overflow_is_skipped_on_all_ranks_and_is_not_bad(two_ranks):
    for outcome in (outcomes["overflow, guard on", None] for outcomes in two_ranks):
        vitals = outcome.vitals[FAULTY_STEP]
        assert (vitals.overflow, vitals.bad, vitals.non_finite) == (1, 0, 0)
        # Weights, moments and the scale that halves with each overflow: what GradScaler alone would do.
        expected = two_ranks[0]["overflow, guard off", None]
        assert outcome.scale == expected.scale < 1e38
        assert_equal(outcome.optimizer, expected.optimizer)
        assert_equal(outcome.model["logit_scale"], expected.model["logit_scale"])


def test_a_broken_rank_does_not_get_a_loss_scale_of_its_own(two_ranks):
    """Negative control: without the guard the scales differ, and the ranks' gradients would from then on."""
    run = "fp16", "NaN gradient after the reduction"
    assert {outcomes[run].scale for outcomes in two_ranks} == {128.0}


class Twin:
    """Adds what a second rank would: the same as this one, unless told otherwise."""

    def __init__(self) -> None:
        self.own = torch.empty(0)
        self.other: Tensor | None = None

    def __call__(self, own: Tensor) -> Tensor:
        self.own = own
        return own + (own if self.other is None else self.other)


def guard_of(**settings: Any) -> StepGuard:
    config = ResilienceConfig(**{"guard_warmup": 10, **settings})
    return StepGuard(config, device=CPU, rank=0, world_size=1, all_reduce_sum=torch.clone)


def judge(guard: StepGuard, loss: float, grad_norm: float = 1.0, **options: Any) -> Vitals:
    return Vitals.from_values(guard.judge(torch.tensor(loss), torch.tensor(grad_norm), **options).vitals.tolist())


def weighted(values: Sequence[float], window: int) -> float:
    return float(np.average(values, weights=(1 - 1 / window) ** np.arange(len(values))[::-1]))


@pytest.mark.parametrize("slope", [0.0, -0.01])
def test_statistics_are_weighted_means_of_good_steps_and_of_their_distances(slope):
    guard, random = guard_of(), np.random.default_rng(0)
    losses = 5 + slope * np.arange(300) + random.normal(size=300) * 0.3
    norms = np.exp(random.normal(size=300) * 0.5)
    for place, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        judge(guard, loss, norm)
        if place % 7 == 0:
            judge(guard, math.nan, 1.0)  # must leave no trace
    found = judge(guard, 3.0)
    for values, mean, std in (
        (losses, found.loss_mean, found.loss_std),
        (np.log(norms), found.log_grad_mean, found.log_grad_std),
    ):
        assert mean == pytest.approx(weighted(values, 50), abs=1e-4)
        distances = [(values[place] - weighted(values[:place], 50)) ** 2 for place in range(1, 300)]
        assert std == pytest.approx(weighted(distances, 100) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (2.0 + 9 * LOSS_STD_FLOOR, 1.0, "loss_high"),
        (2.0, math.exp(9 * 0.2), "grad_high"),
        (math.inf, 1.0, "non_finite"),
    ],
)
def test_a_jump_is_bad_and_a_smaller_one_is_not(loss, grad_norm, reason):
    guard = guard_of()
    for _ in range(20):
        assert not judge(guard, 2.0).bad
    found = judge(guard, loss, grad_norm)
    assert found.bad
    assert [name for name in ("loss_high", "grad_high", "non_finite") if getattr(found, name)] == [reason]
    assert not judge(guard, 2.0 + 7 * LOSS_STD_FLOOR, math.exp(7 * 0.2)).bad
    assert not judge(guard, 0.1, 1e-6).bad  # falling is what they are meant to do


def test_before_the_warmup_only_what_is_not_finite_is_bad():
    guard = guard_of()
    assert not any(judge(guard, 10.0**place, 10.0**place).bad for place in range(10))
    assert judge(guard, math.nan).bad


def test_an_absurd_value_before_the_warmup_does_not_blind_the_guard_for_good():
    guard = guard_of()
    for loss in [2.0, 1e30, *[2.0] * 1000]:
        assert not judge(guard, loss).bad
    assert judge(guard, 9.0).bad


def test_a_gradient_of_zero_is_survived():
    guard = guard_of()
    assert not any(judge(guard, 2.0, 0.0).bad for _ in range(30))
    assert all(math.isfinite(value) for value in judge(guard, 2.0, 0.0))


def test_settled_statistics_accept_another_level():
    guard = guard_of()
    for _ in range(20):
        judge(guard, 2.0)
    assert all(judge(guard, 9.0).bad for _ in range(5))
    guard.settle()
    assert not any(judge(guard, 9.0).bad for _ in range(20))
    assert judge(guard, 12.0).bad


def test_a_guard_goes_on_from_its_state_as_if_nothing_had_happened():
    guard, twin = guard_of(), guard_of()
    for place in range(30):
        judge(guard, 2.0 + 0.1 * math.sin(place), 1.0 + 0.1 * place)
    twin.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert judge(twin, 2.1, 3.0) == judge(guard, 2.1, 3.0)
    assert twin.state_dict() == guard.state_dict()


def test_a_request_is_seen_once_by_all():
    guard = guard_of()
    guard.request(Request.STOP)
    assert [judge(guard, 1.0).stop_requested for _ in range(2)] == [1, 0]
    guard.request(Request.SAVE)
    found = judge(guard, math.nan)
    assert (found.save_requested, found.stop_requested) == (1, 0)


def requests_of_rank_one() -> tuple[float, float]:
    guard = build_guard("off")
    if guard._rank == 1:
        guard.request(Request.STOP)
    found = judge(guard, 1.0)
    return found.stop_requested, found.save_requested


def test_a_request_of_one_rank_reaches_all_of_them_with_the_guard_off():
    assert run_ranks(2, requests_of_rank_one) == [(1, 0), (1, 0)]


def test_the_loss_that_counts_is_the_mean_over_ranks():
    config, twin = ResilienceConfig(guard_warmup=5), Twin()
    guard = StepGuard(config, device=CPU, rank=0, world_size=2, all_reduce_sum=twin)
    for _ in range(10):
        judge(guard, 2.0)
    # This rank 9 deviations up, the other 9 down: nothing happened to the mean.
    twin.other = twin.own.clone()
    twin.other[0] = 2.0 - 9 * LOSS_STD_FLOOR
    found = judge(guard, 2.0 + 9 * LOSS_STD_FLOOR)
    assert not found.bad
    assert found.loss == pytest.approx(2.0)


def damaged_statistics(name: str, value: float, loss: float) -> tuple[float, str, list[int]]:
    """Rank 1's copy is not what the others have; then a step."""
    guard = build_guard(warmup=5)
    for _ in range(10):
        judge(guard, 2.0)
    if guard._rank == 1:
        getattr(guard, name).view(-1)[0] = value
    verdict = guard.judge(torch.tensor(loss), torch.tensor(1.0))
    statistics: list[int] = guard.statistics().tolist()
    return verdict.found_inf.item(), str(verdict.vitals.tolist()), statistics


@pytest.mark.parametrize(
    ("name", "value", "loss", "skipped"),
    [
        ("_mean", -50.0, 2.0, True),  # rank 1 alone would skip it
        ("_mean", 50.0, 2.5, False),  # rank 1 alone would not
        ("_mean", math.nan, 2.5, True),
        ("_variance", math.inf, 2.5, True),
        ("_variance", -1.0, 2.0, False),
        ("_count", 0.0, 2.5, False),
    ],
)
def test_ranks_come_to_one_verdict_though_the_statistics_of_one_are_damaged(name, value, loss, skipped):
    verdicts = run_ranks(2, damaged_statistics, name, value, loss)
    assert [found_inf for found_inf, _, _ in verdicts] == [skipped, skipped]
    assert len({vitals for _, vitals, _ in verdicts}) == 1  # what the host decides on, too
    assert len(differing_tensors([bits for _, _, bits in verdicts], STATISTICS)) >= 1  # and the damage is seen


def test_statistics_of_healthy_ranks_are_equal_to_the_bit(two_ranks):
    assert_equal(two_ranks[0]["adamw", "NaN pixel"].guard, two_ranks[1]["adamw", "NaN pixel"].guard)
    guard = guard_of()
    judge(guard, 2.0)
    assert dict(zip(STATISTICS, guard.statistics().tolist(), strict=True))["guard//count"] == 0x3F800000


def test_vitals_have_a_name_each():
    verdict = guard_of().judge(torch.tensor(1.0), torch.tensor(1.0))
    assert verdict.vitals.shape == (len(VITALS),)
    assert verdict.found_inf.shape == ()
