"""Decides what follows when skipping single steps is not enough. Pure: steps and numbers in, actions out.

    level  when                                                          what
    L0     a bad step                                                    Skipped: the device has left it out already
    L1     3 bad steps in 50, or large updates (RMS above 2.3) on more   Damp: beta2 and learning rate lower for
           than 5 % of the tensors in two measurements in a row          --guard-damp-steps, then Undamp
    L2     the smoothed loss 3.2 deviations up for 20 steps in a row,    Rewind: to a good checkpoint well before the
           or more than 10 bad steps in 100, or more than 50 overflows   onset, leaving out --guard-skip-steps of data
           of a loss scaler in a row
    L3     a rewind within 5000 steps of the one before                  L2, and learning rate x 0.7. Each 20,000 steps
                                                                         without a rewind take one 0.7 back: Restored
    L4     L2 after --guard-max-rewinds rewinds, each of them less       Stop: starting again would end the same way
           than 1000 steps after the one before; or L3 with 0.7^3 in
           force already

So the learning rate is at least 0.343 of its schedule (half of that while damped), and a run that needs less says so by
ending. It comes back in steps, as it went: at the full rate at once the run might be where it started.

Large updates damp at the second measurement only, for one alone comes up in healthy runs and would cost them 500 steps
at half the rate; and not at all under an optimizer that divides its updates by the RMS itself.

NaN in the weights makes every step bad, so it is rewound as L2 does and stopped as L4 does. A lasting change of level,
of the data for instance, is rewound as well; if that did not help, the second rewind asks for new statistics, which the
new level is part of. So it cannot stall a run.

Every rank observes the same numbers, so all come to the same decisions without asking each other.

Source of the levels: Wortsman et al. 2023 (arXiv 2304.13013), appendix on loss spikes, for 3.2 deviations and the RMS
of 2.3; Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), section 5.1, for rewinding 100 steps and leaving out 200 to 500.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from training.config import ResilienceConfig
from training.resilience.guard import Vitals

DAMP_SKIPS, DAMP_WINDOW = 3, 50
REWIND_SKIPS, REWIND_WINDOW = 10, 100
MOST_OVERFLOWS = 50
LARGE_UPDATE_RMS = 2.3
"""Of one tensor: an update is this many times what its second moment accounts for."""
LARGE_UPDATE_SHARE = 0.05
SPIKE_STD = 3.2
SPIKE_STEPS = 20
SPIKE_STD_FLOOR = 0.1
"""Nats. A rewind needs a rise of at least 0.32, however calm the loss was before."""
REFERENCE_LAG = 40
"""A spike is measured against statistics of this many steps ago, which it has not become part of yet."""
REWIND_MARGIN = 100
"""Steps between the checkpoint that a rewind goes back to and the onset."""
GOOD_WINDOW = 200
"""Clean steps that follow a checkpoint before it counts as good."""
REPEATED_WITHIN = 5000
REPEATED_LR_FACTOR = 0.7
MOST_REDUCTIONS = 3
"""In force at the same time: 0.343. A learning rate wrong by more than that is a setting to change, not to repair."""
RESTORED_AFTER = 20_000
"""Steps without a rewind."""
PROGRESS_STEPS = 1000


@dataclass(frozen=True)
class Skipped:
    """A step was left out."""

    step: int
    reason: str


@dataclass(frozen=True)
class Damp:
    """beta2 and learning rate are lowered, or stay lowered, until a step."""

    step: int
    until_step: int
    reason: str


@dataclass(frozen=True)
class Undamp:
    """They are what they were again."""

    step: int


@dataclass(frozen=True)
class Rewind:
    """The weights go back, the data does not.

    The checkpoint: the newest good one at least ``REWIND_MARGIN`` steps before ``onset``, else the newest before it.
    The data: batches up to step ``resume_step`` are read and left out; a caller that is further already stays there.
    Without any checkpoint to go back to, the caller says so with ``Escalation.go_on``, and settles the guard.
    """

    step: int
    onset: int
    resume_step: int
    reason: str
    settle: bool = False
    """The last rewind did not help: the guard's statistics are to be forgotten, not taken from the checkpoint."""


@dataclass(frozen=True)
class Restored:
    """Enough steps without a rewind: one of the lasting reductions of the learning rate is taken back."""

    step: int
    lr_factor: float
    """That is left of them; 1 if none is."""


@dataclass(frozen=True)
class Stop:
    """The run ends, with the code that says: do not start it again."""

    step: int
    reason: str


Action = Skipped | Damp | Undamp | Rewind | Restored | Stop


class Escalation:
    """The history of a run's trouble, as far as decisions depend on it."""

    def __init__(self, config: ResilienceConfig, *, clips_updates: bool = False) -> None:
        """
        Args:
            clips_updates: the optimizer divides an update by its RMS (StableAdamW): a large one asks for nothing more.
        """
        self._config = config
        self._clips_updates = clips_updates
        self._newest = -1
        self._good_through = 0
        self._clean_since = 0
        self._unclean: deque[int] = deque(maxlen=1000)
        """Steps that were bad or within a spike."""
        self._skips: deque[int] = deque(maxlen=REWIND_WINDOW)
        self._overflows = 0
        """In a row."""
        self._spike = _SpikeDetector(warmup=config.guard_warmup)
        self._damped_until: int | None = None
        self._large_updates = False
        """In the latest measurement."""
        self._reductions = 0
        """Of the learning rate, by ``REPEATED_LR_FACTOR`` each."""
        self._calm_since = 0
        """No rewind since this step, nor a reduction taken back."""
        self._rewinds = 0
        """Without progress in between."""
        self._last_rewind: int | None = None
        self._resume_step = 0
        """Earlier steps belong to a past that was rewound."""
        self._stopped = False

    @property
    def lr_factor(self) -> float:
        """What the scheduled learning rate is multiplied by now."""
        damping = 1.0 if self._damped_until is None else self._config.guard_damp_lr
        return self._lasting_lr_factor * damping

    @property
    def beta2(self) -> float | None:
        """What beta2 is lowered to now; None if it is as configured."""
        return None if self._damped_until is None else self._config.guard_damp_beta2

    @property
    def resume_step(self) -> int:
        """Data of earlier steps is left out, since the last rewind."""
        return self._resume_step

    def good_through(self) -> int:
        """The newest step whose checkpoint is known to be followed by ``GOOD_WINDOW`` clean steps; 0 if none is."""
        return self._good_through

    def is_good(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` was followed by clean steps only. Ask soon: 1000 unclean steps are kept."""
        return step <= self._good_through and not any(step <= place < step + GOOD_WINDOW for place in self._unclean)

    def observe(self, step: int, vitals: Vitals) -> list[Action]:
        """Takes the vitals of one step, in order; returns what is to be done, at most one of Rewind and Stop."""
        if step < self._resume_step or self._stopped:
            return []
        self._newest = step
        actions: list[Action] = []
        if vitals.bad:
            self._skips.append(step)
            actions.append(Skipped(step, describe(vitals)))
        self._overflows = self._overflows + 1 if vitals.overflow else 0
        self._spike.observe(step, vitals)
        # A single skipped step has changed nothing, so it says nothing against the weights before it.
        in_trouble = bool(vitals.bad) and self._skips_within(step, DAMP_WINDOW) >= DAMP_SKIPS
        self._note_cleanness(step, unclean=in_trouble or self._spike.is_above)
        if self._rewinds and self._last_rewind is not None and step >= self._resume_step + PROGRESS_STEPS:
            self._rewinds = 0

        if (trouble := self._find_trouble(step)) is not None:
            return [*actions, self._rewind_or_stop(step, *trouble)]
        if vitals.bad and self._skips_within(step, DAMP_WINDOW) >= DAMP_SKIPS:
            actions.append(self._damp(step, f"{DAMP_SKIPS} bad steps within {DAMP_WINDOW}"))
        elif self._damped_until is not None and step >= self._damped_until:
            self._damped_until = None
            actions.append(Undamp(step))
        if self._reductions and step - self._calm_since >= RESTORED_AFTER:
            self._reductions -= 1
            self._calm_since = step
            actions.append(Restored(step, self._lasting_lr_factor))
        return actions

    def observe_update_rms(self, step: int, share: float) -> list[Action]:
        """Takes the share of tensors whose update RMS is above ``LARGE_UPDATE_RMS``, whenever it is measured."""
        # In the first steps a second moment is an average of few gradients, and a large update says nothing.
        if self._clips_updates or step < self._resume_step or self._stopped or not self._spike.is_warm:
            return []
        before, self._large_updates = self._large_updates, share > LARGE_UPDATE_SHARE
        if not (before and self._large_updates):
            return []
        return [self._damp(step, f"update RMS above {LARGE_UPDATE_RMS} on {share:.0%} of the tensors, twice in a row")]

    def go_on(self, step: int) -> None:
        """A rewind could not be made: steps from ``step`` on are observed, and none is left out. It counts as tried."""
        self._resume_step = self._clean_since = min(self._resume_step, step)

    def settle(self) -> None:
        """Forgets what the loss was like: with another global batch it is another."""
        self._spike = _SpikeDetector(warmup=self._config.guard_warmup)
        self._large_updates = False

    def state_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        return {
            "newest": self._newest,
            "good_through": self._good_through,
            "clean_since": self._clean_since,
            "unclean": list(self._unclean),
            "skips": list(self._skips),
            "overflows": self._overflows,
            "spike": self._spike.state_dict(),
            "damped_until": self._damped_until,
            "large_updates": self._large_updates,
            "lasting_lr_factor": self._lasting_lr_factor,
            "calm_since": self._calm_since,
            "rewinds": self._rewinds,
            "last_rewind": self._last_rewind,
            "resume_step": self._resume_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the one whose state it was would have."""
        self._newest = int(state["newest"])
        self._good_through = int(state["good_through"])
        self._clean_since = int(state["clean_since"])
        self._unclean = deque(state["unclean"], maxlen=self._unclean.maxlen)
        self._skips = deque(state["skips"], maxlen=self._skips.maxlen)
        self._overflows = int(state["overflows"])
        self._spike.load_state_dict(state["spike"])
        self._damped_until = state["damped_until"]
        self._large_updates = bool(state.get("large_updates", False))
        # The factor, as older checkpoints have it; they do not have the two others.
        self._reductions = round(math.log(state["lasting_lr_factor"], REPEATED_LR_FACTOR))
        self._calm_since = int(state.get("calm_since", state["newest"]))
        self._rewinds = int(state["rewinds"])
        self._last_rewind = state["last_rewind"]
        self._resume_step = int(state["resume_step"])

    @property
    def _lasting_lr_factor(self) -> float:
        return float(REPEATED_LR_FACTOR**self._reductions)

    def _note_cleanness(self, step: int, *, unclean: bool) -> None:
        if unclean:
            self._unclean.append(step)
            self._clean_since = step + 1
        elif step + 1 - self._clean_since >= GOOD_WINDOW:
            self._good_through = step + 1 - GOOD_WINDOW

    def _skips_within(self, step: int, window: int) -> int:
        return sum(place > step - window for place in self._skips)

    def _find_trouble(self, step: int) -> tuple[int, str] | None:
        """(onset, reason) of what one skipped step cannot cure."""
        if self._spike.is_spike:
            return self._spike.onset, f"the loss was {SPIKE_STD} deviations up for {SPIKE_STEPS} steps"
        if (skips := self._skips_within(step, REWIND_WINDOW)) > REWIND_SKIPS:
            onset = min(place for place in self._skips if place > step - REWIND_WINDOW)
            return onset, f"{skips} bad steps within {REWIND_WINDOW}"
        if self._overflows > MOST_OVERFLOWS:
            return step + 1 - self._overflows, f"{self._overflows} overflows of the loss scaler in a row"
        return None

    def _rewind_or_stop(self, step: int, onset: int, reason: str) -> Rewind | Stop:
        if self._rewinds >= self._config.guard_max_rewinds:
            tried = f"after {self._rewinds} rewinds without {PROGRESS_STEPS} steps of progress"
            return self._stop(step, reason, tried, "allow more with --guard-max-rewinds")
        repeated = self._last_rewind is not None and step - self._last_rewind <= REPEATED_WITHIN
        if repeated and self._reductions >= MOST_REDUCTIONS:
            tried = f"and the learning rate is lowered to {self._lasting_lr_factor:.2g} of its schedule already"
            return self._stop(step, reason, tried, "start from an earlier checkpoint")
        self._reductions += repeated
        self._rewinds += 1
        self._last_rewind = self._calm_since = step
        self._resume_step = max(step + 1, onset + self._config.guard_skip_steps)
        # Of overflows no single step was bad; all together they say that the weights before them were not good.
        self._unclean.extend(place for place in range(onset, step + 1) if place not in self._unclean)
        self._clean_since = self._resume_step
        self._skips.clear()
        self._overflows = 0
        self.settle()
        return Rewind(step, onset, self._resume_step, reason, settle=self._rewinds > 1)

    def _stop(self, step: int, reason: str, tried: str, otherwise: str) -> Stop:
        self._stopped = True
        remedy = f"lower --lr or --beta2, look at the data of these steps, or {otherwise}"
        return Stop(step, f"step {step}: {reason}, {tried}: {remedy}")

    def _damp(self, step: int, reason: str) -> Damp:
        self._damped_until = step + self._config.guard_damp_steps
        return Damp(step, self._damped_until, reason)


class _SpikeDetector:
    """Compares a short mean of the loss with the statistics of a while ago, which are held while it is above them."""

    def __init__(self, *, warmup: int) -> None:
        self._warmup = warmup
        self._seen = 0
        self._mean: float | None = None
        """Over about ``SPIKE_STEPS`` steps."""
        self._references: deque[float] = deque(maxlen=REFERENCE_LAG)
        """The limit that followed from the statistics of each recent step, oldest first."""
        self._above = 0
        """Steps in a row."""
        self.onset = 0
        """First step of the short mean that rose above the limit."""

    @property
    def is_warm(self) -> bool:
        return self._seen >= self._warmup

    @property
    def is_above(self) -> bool:
        return self._above > 0

    @property
    def is_spike(self) -> bool:
        return self._above >= SPIKE_STEPS

    def observe(self, step: int, vitals: Vitals) -> None:
        if not math.isfinite(vitals.loss):
            return  # counted as a bad step; it has no place in a mean
        rate = 2 / (SPIKE_STEPS + 1)
        self._mean = vitals.loss if self._mean is None else self._mean + rate * (vitals.loss - self._mean)
        if len(self._references) == REFERENCE_LAG and self._mean > self._references[0]:
            self._above += 1
            if self._above == 1:
                self.onset = max(0, step + 1 - SPIKE_STEPS)
            return
        self._above = 0
        self._seen += not vitals.bad
        if self.is_warm:
            self._references.append(vitals.loss_mean + SPIKE_STD * max(vitals.loss_std, SPIKE_STD_FLOOR))

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self._seen,
            "mean": self._mean,
            "references": list(self._references),
            "above": self._above,
            "onset": self.onset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = int(state["seen"])
        self._mean = state["mean"]
        self._references = deque(state["references"], maxlen=REFERENCE_LAG)
        self._above = int(state["above"])
        self.onset = int(state["onset"])


def describe(vitals: Vitals) -> str:
    """Why a step was bad, in words."""
    reasons = []
    if vitals.non_finite:
        reasons.append("loss or gradient is not finite")
    if vitals.loss_high:
        reasons.append(f"loss {vitals.loss:.4g} is {vitals.loss_z:.1f} deviations above {vitals.loss_mean:.4g}")
    if vitals.grad_high:
        usual = math.exp(min(vitals.log_grad_mean, 700.0))
        reasons.append(f"gradient norm {vitals.grad_norm:.4g} is far above {usual:.4g} (z {vitals.grad_z:.1f})")
    rank = f", on rank {vitals.flagged_rank:.0f} only" if vitals.flagged_ranks == 1 else ""
    return " and ".join(reasons) + rank
