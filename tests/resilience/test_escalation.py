"""What follows from which history of steps, which checkpoints are good, and that a restart forgets nothing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest

from training.config import ResilienceConfig
from training.resilience.escalation import (
    Action,
    Damp,
    Escalation,
    Restored,
    Rewind,
    Skipped,
    Stop,
    Undamp,
    describe,
)
from training.resilience.guard import Vitals

CALM = Vitals(
    *(0, 0, 0, 0, 0, 0, -1),  # no flags
    *(2.0, 1.0),  # loss and gradient norm
    *(2.0, 0.05, 0.0, 0.2),  # statistics
    *(0, 0),  # no requests
)
BAD = CALM._replace(bad=1, non_finite=1, loss=math.nan)
OVERFLOW = CALM._replace(overflow=1)


def observe(escalation: Escalation, vitals: Iterable[Vitals], *, start: int = 0) -> list[Action]:
    return [action for step, each in enumerate(vitals, start=start) for action in escalation.observe(step, each)]


def history(length: int, bad: Iterable[int]) -> list[Vitals]:
    places = set(bad)
    return [BAD if place in places else CALM for place in range(length)]


def kinds(actions: Iterable[Action]) -> list[str]:
    return [type(action).__name__ for action in actions if not isinstance(action, Skipped)]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([], []),
        ([300], []),
        ([300, 349], []),
        ([300, 320, 350], []),  # three within 51
        ([300, 320, 349], ["Damp", "Undamp"]),
        (range(300, 700, 40), []),  # one in 40, for ever
        (range(300, 400, 20), ["Damp", "Damp", "Damp", "Undamp"]),  # each of them prolongs it
        (range(300, 310), ["Damp"] * 8 + ["Undamp"]),
        (range(300, 311), ["Damp"] * 8 + ["Rewind", "Undamp"]),
    ],
)
def test_skips_escalate_by_how_close_they_are(bad, expected):
    actions = observe(Escalation(ResilienceConfig()), history(1500, bad))
    assert kinds(actions) == expected
    assert [action.step for action in actions if isinstance(action, Skipped)] == list(bad)


def test_damping_lowers_beta2_and_lr_until_its_step():
    escalation = Escalation(ResilienceConfig(guard_damp_steps=30, guard_damp_lr=0.25, guard_damp_beta2=0.9))
    assert (escalation.lr_factor, escalation.beta2) == (1.0, None)
    (damp,) = [action for action in observe(escalation, history(10, [1, 2, 3])) if isinstance(action, Damp)]
    assert (damp.step, damp.until_step, damp.reason) == (3, 33, "3 bad steps within 50")
    assert (escalation.lr_factor, escalation.beta2) == (0.25, 0.9)
    assert observe(escalation, [CALM] * 24, start=10) == [Undamp(33)]
    assert (escalation.lr_factor, escalation.beta2) == (1.0, None)


@pytest.mark.parametrize(
    ("shares", "seen", "damps"),
    [
        ([0.04, 0.04], 200, 0),
        ([0.06], 200, 0),  # one sample of a healthy run
        ([0.06, 0.0, 0.06, 0.05, 0.06], 200, 0),
        ([0.06, 0.06], 200, 1),
        ([0.06, 0.06, 0.06], 200, 2),
        ([0.06, 0.06], 50, 0),  # before the second moments mean something
    ],
)
def test_large_updates_damp_if_two_measurements_in_a_row_find_them(shares, seen, damps):
    escalation = Escalation(ResilienceConfig())
    observe(escalation, [CALM] * seen)
    actions = [action for place, share in enumerate(shares) for action in measure(escalation, seen + place, share)]
    reason = "update RMS above 2.3 on 6% of the tensors, twice in a row"
    steps = range(seen + len(shares) - damps, seen + len(shares))
    assert actions == [Damp(step, step + 500, reason) for step in steps]


def measure(escalation: Escalation, step: int, share: float) -> list[Action]:
    """After a restart, which must not forget the measurement before it."""
    restarted = Escalation(ResilienceConfig())
    restarted.load_state_dict(json.loads(json.dumps(escalation.state_dict())))
    expected = restarted.observe_update_rms(step, share)
    assert escalation.observe_update_rms(step, share) == expected
    return expected


def test_large_updates_do_not_damp_an_optimizer_that_clips_them():
    escalation = Escalation(ResilienceConfig(), clips_updates=True)
    observe(escalation, [CALM] * 200)
    assert [escalation.observe_update_rms(step, 1.0) for step in range(200, 210)] == [[]] * 10
    assert escalation.lr_factor == 1


def test_a_rewind_goes_to_the_first_of_the_bad_steps_and_leaves_data_out():
    escalation = Escalation(ResilienceConfig(guard_skip_steps=50))
    actions = observe(escalation, history(320, [250, *range(300, 310)]))
    expected = Rewind(step=309, onset=250, resume_step=310, reason="11 bad steps within 100")
    assert actions[-1] == expected
    again = Escalation(ResilienceConfig(guard_skip_steps=200))
    assert observe(again, history(320, [250, *range(300, 310)]))[-1] == Rewind(309, 250, 450, expected.reason)


def noisy(level: float, length: int, *, seed: int = 0) -> list[Vitals]:
    draw = random.Random(seed)
    return [CALM._replace(loss=level + draw.gauss(0, 0.05)) for _ in range(length)]


@pytest.mark.parametrize(("level", "length", "rewinds"), [(2.0, 500, 0), (2.2, 200, 0), (2.6, 20, 0), (2.6, 60, 1)])
def test_a_loss_that_stays_up_is_rewound_and_one_that_comes_down_is_not(level, length, rewinds):
    escalation = Escalation(ResilienceConfig())
    actions = observe(escalation, noisy(2.0, 300) + noisy(level, length, seed=1) + noisy(2.0, 300))
    assert kinds(actions) == ["Rewind"] * rewinds
    for action in actions:
        assert isinstance(action, Rewind)
        assert 285 <= action.onset <= 305
        assert action.reason == "the loss was 3.2 deviations up for 20 steps"


def test_a_spike_is_seen_although_it_enters_the_statistics():
    """The guard's own mean and deviation follow a rise: measured against them none lasts for 20 steps."""
    escalation, mean, variance = Escalation(ResilienceConfig()), 2.0, 0.05**2
    actions = []
    for step, vitals in enumerate(noisy(2.0, 300) + noisy(2.8, 100, seed=1)):
        actions += escalation.observe(step, vitals._replace(loss_mean=mean, loss_std=max(0.05, variance**0.5)))
        change = vitals.loss - mean
        mean, variance = mean + change / 100, 0.99 * (variance + change**2 / 100)
    assert kinds(actions) == ["Rewind"]


def test_overflows_of_a_loss_scaler_are_normal_unless_they_do_not_end():
    escalation = Escalation(ResilienceConfig())
    assert observe(escalation, ([OVERFLOW] * 50 + [CALM]) * 4) == []
    (rewind,) = observe(escalation, [OVERFLOW] * 51, start=204)
    assert isinstance(rewind, Rewind)
    assert (rewind.onset, rewind.reason) == (204, "51 overflows of the loss scaler in a row")


def test_a_checkpoint_that_overflows_followed_is_not_good():
    escalation = Escalation(ResilienceConfig())
    observe(escalation, [CALM] * 500 + [OVERFLOW] * 51)
    observe(escalation, [CALM] * 600, start=551)
    assert escalation.good_through() > 800
    assert [escalation.is_good(step) for step in (300, 301, 499, 550, 700)] == [True, False, False, False, True]


def trouble(escalation: Escalation, start: int) -> Action:
    """Eleven bad steps from ``start`` on; the last action that follows."""
    return observe(escalation, [BAD] * 11, start=start)[-1]


def test_a_second_rewind_soon_after_the_first_lowers_the_learning_rate_for_good():
    escalation = Escalation(ResilienceConfig(guard_damp_lr=1.0))
    assert isinstance(trouble(escalation, 1000), Rewind)
    assert escalation.lr_factor == 1.0
    assert isinstance(trouble(escalation, 7000), Rewind)
    assert escalation.lr_factor == 1.0
    assert isinstance(trouble(escalation, 9000), Rewind)
    assert escalation.lr_factor == pytest.approx(0.7)


def test_the_learning_rate_is_lowered_three_times_at_most_and_then_the_run_ends():
    escalation = Escalation(ResilienceConfig(guard_damp_lr=1.0))
    actions, factors = [], []
    for start in range(1000, 1000 + 5 * 1300, 1300):  # with progress in between: --guard-max-rewinds does not end it
        actions.append(trouble(escalation, start))
        factors.append(round(escalation.lr_factor, 3))
        observe(escalation, [CALM] * 1080, start=start + 211)
    assert factors == [1.0, 0.7, 0.49, 0.343, 0.343]
    assert kinds(actions) == ["Rewind"] * 4 + ["Stop"]
    stop = actions[-1]
    assert isinstance(stop, Stop)
    assert stop.reason == (
        "step 6210: 11 bad steps within 100, and the learning rate is lowered to 0.34 of its schedule already: "
        "lower --lr or --beta2, look at the data of these steps, or start from an earlier checkpoint"
    )


def test_each_20000_steps_without_a_rewind_take_one_reduction_back():
    escalation = Escalation(ResilienceConfig(guard_damp_lr=1.0))
    for start in (1000, 3000, 5000):
        trouble(escalation, start)
    assert escalation.lr_factor == pytest.approx(0.49)
    actions = observe(escalation, [CALM] * 65_000, start=5300)
    restored = [action for action in actions if isinstance(action, Restored)]
    assert [(action.step, round(action.lr_factor, 3)) for action in restored] == [(25_010, 0.7), (45_010, 1.0)]
    assert escalation.lr_factor == 1


@pytest.mark.parametrize("factor", [1.0, 0.7, 0.7**3])
def test_the_state_of_an_older_version_keeps_its_learning_rate(factor):
    escalation = Escalation(ResilienceConfig())
    state = escalation.state_dict() | {"lasting_lr_factor": factor, "newest": 30_000}
    escalation.load_state_dict({name: state[name] for name in state if name not in ("calm_since", "large_updates")})
    assert escalation.lr_factor == pytest.approx(factor)
    assert observe(escalation, [CALM] * 1000, start=30_001) == []


def test_rewinds_without_progress_end_the_run():
    escalation = Escalation(ResilienceConfig(guard_max_rewinds=2))
    assert isinstance(trouble(escalation, 1000), Rewind)
    assert isinstance(trouble(escalation, 1500), Rewind)
    stop = trouble(escalation, 2000)
    assert isinstance(stop, Stop)
    assert stop.reason.startswith("step 2010: 11 bad steps within 100, after 2 rewinds without 1000 steps of progress:")
    assert "--guard-max-rewinds" in stop.reason
    assert observe(escalation, [BAD] * 200, start=2100) == []  # said once


def test_rewinds_with_progress_in_between_do_not_end_the_run():
    escalation = Escalation(ResilienceConfig(guard_max_rewinds=2))
    for start in range(1000, 50_000, 5500):
        assert isinstance(trouble(escalation, start), Rewind)
        observe(escalation, [CALM] * 1500, start=start + 300)


def test_a_rewind_that_did_not_help_asks_for_new_statistics():
    escalation = Escalation(ResilienceConfig(guard_max_rewinds=9))
    rewinds = [trouble(escalation, start) for start in (1000, 1300, 3000)]
    assert [rewind.settle for rewind in rewinds if isinstance(rewind, Rewind)] == [False, True, False]


def test_a_run_that_has_nothing_to_go_back_to_goes_on_and_is_stopped_in_the_end():
    escalation = Escalation(ResilienceConfig(guard_max_rewinds=2))
    for start in (20, 33):
        assert isinstance(trouble(escalation, start), Rewind)
        escalation.go_on(start + 13)  # two more steps were under way
    assert isinstance(trouble(escalation, 46), Stop)


def test_no_rewind_is_made_where_none_is_allowed():
    assert isinstance(trouble(Escalation(ResilienceConfig(guard_max_rewinds=0)), 1000), Stop)


def test_steps_of_a_past_that_was_rewound_are_ignored():
    escalation = Escalation(ResilienceConfig(guard_skip_steps=200))
    assert trouble(escalation, 1000) == Rewind(1010, 1000, 1200, "11 bad steps within 100")
    assert observe(escalation, [BAD] * 189, start=1011) == []  # on their way to the host when it was decided
    assert [escalation.observe_update_rms(step, 1.0) for step in (1100, 1150)] == [[], []]
    assert kinds(observe(escalation, [BAD], start=1200)) == []


def test_a_checkpoint_is_good_once_its_next_200_steps_are_known_to_be_clean():
    escalation = Escalation(ResilienceConfig())
    observe(escalation, [CALM] * 199)
    assert (escalation.good_through(), escalation.is_good(1)) == (0, False)
    observe(escalation, [CALM] * 301, start=199)
    assert escalation.good_through() == 300
    observe(escalation, [BAD] * 3, start=500)
    observe(escalation, [CALM] * 199, start=503)
    assert escalation.good_through() == 302
    observe(escalation, [CALM] * 20, start=702)
    assert escalation.good_through() == 522
    assert [escalation.is_good(step) for step in (1, 302, 303, 502, 503, 522, 523)] == [
        *(True, True),
        *(False, False),  # followed by trouble, however calm it is now
        *(True, True),
        False,
    ]


def test_one_skipped_step_says_nothing_against_the_weights_before_it():
    escalation = Escalation(ResilienceConfig())
    observe(escalation, [CALM] * 300 + [BAD] + [CALM] * 300)
    assert escalation.good_through() == 401
    assert escalation.is_good(200)


def test_a_checkpoint_within_a_spike_is_not_good_although_no_step_was_bad():
    escalation = Escalation(ResilienceConfig())
    observe(escalation, noisy(2.0, 500) + noisy(2.7, 15, seed=1) + noisy(2.0, 400))
    assert not escalation.is_good(400)
    assert escalation.is_good(escalation.good_through())
    assert escalation.good_through() > 600


@pytest.mark.parametrize("cut", [50, 305, 320, 450, 560, 700])
def test_a_restart_decides_as_if_it_had_not_happened(cut):
    steps = [
        *noisy(2.0, 300),
        *(BAD, CALM, BAD, CALM, BAD),
        *noisy(2.7, 100, seed=1),
        *noisy(2.0, 150),
        *[BAD] * 11,
        *noisy(2.0, 600),
    ]
    plain = Escalation(ResilienceConfig())
    observe(plain, steps[:cut])
    resumed = Escalation(ResilienceConfig())
    resumed.load_state_dict(json.loads(json.dumps(plain.state_dict())))
    expected = observe(plain, steps[cut:], start=cut)
    assert observe(resumed, steps[cut:], start=cut) == expected
    assert resumed.state_dict() == plain.state_dict()
    assert (resumed.lr_factor, resumed.beta2) == (plain.lr_factor, plain.beta2)


@pytest.mark.parametrize(
    ("vitals", "words"),
    [
        (BAD, "loss or gradient is not finite"),
        (CALM._replace(bad=1, loss_high=1, loss=2.5), "loss 2.5 is 10.0 deviations above 2"),
        (
            CALM._replace(bad=1, grad_high=1, grad_norm=math.exp(2), flagged_ranks=1, flagged_rank=3),
            r"gradient norm 7.389 is far above 1 (z 10.0), on rank 3 only",
        ),
    ],
)
def test_a_skipped_step_is_described_in_words(vitals, words):
    assert describe(vitals) == words
