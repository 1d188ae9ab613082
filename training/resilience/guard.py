"""Judges every step on the device, by one verdict that all ranks share: was it good enough to change the weights?

    loss, gradient norm of this rank \\
    what this rank knows as usual     |
    requests to stop or save          -> one all-reduce of 17 numbers -> StepVerdict -> optimizer.found_inf
                                                                              \\-> vitals, read later on the host

A step is bad if a loss or a gradient norm is not finite on any rank, or, once enough good steps are known, if the mean
loss or the logarithm of a gradient norm is many standard deviations above its mean. A bad step changes nothing on any
rank: a rank that skipped alone would be another model from then on. Bad steps do not enter the statistics.

The statistics are replicas: all ranks learn the same from the same sums. Still a step is judged, and reported, by their
mean over ranks, which travels with the rest: were one rank's copy damaged, its verdict would be its own otherwise. That
costs 24 bytes in a message whose time is all latency; a second all-reduce of the verdict would double that time. The
damage itself, which may blind or alarm all ranks alike, is what ``statistics`` is compared for.

Nothing here waits for the device. What the host learns, it learns from ``DelayedVitals``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from training.config import ResilienceConfig

MEAN_WINDOW, STD_WINDOW = 50, 100
"""Good steps after which a value has lost most of its weight. The mean is the faster one: behind a loss that falls
steadily it lags by as many steps, and that lag would be taken for deviation."""
LOSS_STD_FLOOR = 0.05
"""Nats. A loss that hardly moves has next to no deviation, and any change would be an alarm."""
LOG_GRAD_STD_FLOOR = 0.2
"""The same for the logarithm of the gradient norm: 8 of these are a factor of 5."""
_SMALLEST_NORM = 1e-12
_LARGEST_CHANGE = 100.0
"""Of what enters the statistics: one absurd value before the warm-up is over must not blind them for good."""
_LOSS, _GRAD = 0, 1


STATISTICS = tuple(f"guard//{name}" for name in ("count", "loss_mean", "grad_mean", "loss_variance", "grad_variance"))
"""What ``StepGuard.statistics`` holds, for messages."""


class Request(enum.Enum):
    """What one rank may ask of all."""

    STOP = "stop"
    SAVE = "save"


class Vitals(NamedTuple):
    """What all ranks know about one step; flags are 0 or 1. The statistics are those that it was judged by."""

    bad: float
    """The step was judged bad: skipped by a guard that acts. An overflow alone is not bad."""
    non_finite: float
    loss_high: float
    grad_high: float
    overflow: float
    """Scaled fp16 gradients overflowed: skipped, and the loss scaler lowers its scale."""
    flagged_ranks: float
    """How many ranks found something wrong with what they have themselves."""
    flagged_rank: float
    """Which one, if it is one; else -1."""
    loss: float
    """Mean over the ranks whose loss is finite; NaN without any."""
    grad_norm: float
    """Before clipping; mean over the ranks where it is finite, NaN without any."""
    loss_mean: float
    loss_std: float
    """Not below its floor."""
    log_grad_mean: float
    log_grad_std: float
    """Not below its floor."""
    stop_requested: float
    """How many ranks asked to stop."""
    save_requested: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Self:
        """From the numbers of ``StepVerdict.vitals``."""
        return cls(*values)

    @property
    def loss_z(self) -> float:
        """Standard deviations of the loss above its mean."""
        return (self.loss - self.loss_mean) / self.loss_std

    @property
    def grad_z(self) -> float:
        """Standard deviations of the logarithm of the gradient norm above its mean."""
        return (math.log(max(self.grad_norm, _SMALLEST_NORM)) - self.log_grad_mean) / self.log_grad_std


VITALS = Vitals._fields


class StepVerdict(NamedTuple):
    """What follows from one step, on the device; equal on all ranks."""

    found_inf: Tensor
    """0-D float32: 1 if nothing may change. What the fused optimizers call it; they compare it with exactly 1."""
    gradient_overflow: Tensor
    """0-D float32: 1 if the gradient of any rank is not finite. What a loss scaler adapts to."""
    vitals: Tensor
    """1-D float32, one number per name in ``VITALS``."""


class _Own(NamedTuple):
    """What one rank adds to the all-reduce, in the order of the reduced vector: 0-D tensors, and the statistics."""

    loss: Tensor
    finite_loss: Tensor
    grad_norm: Tensor
    finite_norm: Tensor
    grad_high: Tensor
    flagged: Tensor
    """Something is wrong with the loss or the gradient that this rank has."""
    flagged_rank: Tensor
    source: Tensor
    """Something is wrong with the features that this rank computed: closer to the cause, for they reach all losses."""
    source_rank: Tensor
    stop: Tensor
    save: Tensor
    finite_statistics: Tensor
    warm: Tensor
    """Enough good steps are known to this rank."""
    mean: Tensor
    """[2]: loss, logarithm of the gradient norm; zero, as the next, if any of the statistics is not finite."""
    std: Tensor
    """[2]"""

    @classmethod
    def from_vector(cls, vector: Tensor) -> Self:
        """The sum of what all ranks added."""
        return cls(*vector[:-4].unbind(), *vector[-4:].split(2))

    def vector(self) -> Tensor:
        """What one all-reduce takes."""
        return torch.cat([torch.stack(self[:-2]), *self[-2:]])


class StepGuard:
    """The statistics of the run's good steps, and the verdict over the next one."""

    def __init__(
        self,
        config: ResilienceConfig,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        all_reduce_sum: Callable[[Tensor], Tensor],
    ) -> None:
        """
        Args:
            all_reduce_sum: element-wise sum over ranks, as a new tensor.
        """
        self.acts = config.guard == "on"
        """Whether bad steps are skipped, or measured only."""
        self._rank = rank
        self._world_size = world_size
        self._all_reduce_sum = all_reduce_sum
        self._warmup = config.guard_warmup
        self._requests: set[Request] = set()
        # Built once: a tensor of Python numbers per step would be a copy to the device that waits.
        self._thresholds = torch.tensor([config.guard_loss_z, config.guard_grad_z], device=device)
        self._floors = torch.tensor([LOSS_STD_FLOOR, LOG_GRAD_STD_FLOOR], device=device)
        self._zero = torch.zeros((), device=device)
        self._nobody = torch.full((), -1.0, device=device)
        self._count = torch.zeros((), device=device)
        """Good steps seen."""
        self._mean = torch.zeros(2, device=device)
        """[2]: loss, logarithm of the gradient norm."""
        self._variance = torch.zeros(2, device=device)

    def request(self, request: Request) -> None:
        """Asks all ranks for something: they find it in the vitals of the next step. Any thread may call it."""
        self._requests = {*self._requests, request}

    @torch.no_grad()
    def judge(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        *,
        features: Tensor | None = None,
        overflow_is_normal: bool = False,
    ) -> StepVerdict:
        """The verdict over the current step. Collective: all ranks, one small all-reduce; no host sync.

        Args:
            loss: this rank's loss, 0-D.
            grad_norm: of the whole gradient before clipping, 0-D; equal on all ranks unless one of them is broken.
            features: sum of the features that this rank computed, 0-D: names the rank whose input or tower is broken.
            overflow_is_normal: gradients are those of a scaled loss; if they alone are not finite, nothing is wrong.
        """
        own = self._measure(loss, grad_norm, features)
        total = _Own.from_vector(self._all_reduce_sum(own.vector()))  # collective: all ranks
        mean, std = total.mean / total.finite_statistics, total.std / total.finite_statistics
        is_warm = 2 * total.warm > self._world_size
        loss_limit = mean[_LOSS] + self._thresholds[_LOSS] * std[_LOSS]

        values = torch.stack([total.loss / total.finite_loss, total.grad_norm / total.finite_norm])  # 0 / 0 is NaN
        bad_loss, bad_norm = total.finite_loss < self._world_size, total.finite_norm < self._world_size
        # An overflow is in the reduced gradient, so on all ranks; on some of them only it is another kind of damage.
        overflow = (total.finite_norm == 0) & ~bad_loss & overflow_is_normal
        non_finite = (bad_loss | bad_norm) & ~overflow
        loss_high = ~bad_loss & is_warm & (values[_LOSS] > loss_limit)
        grad_high = total.grad_high > 0
        bad = non_finite | loss_high | grad_high
        skip = bad | overflow

        from_source = total.source > 0
        flagged = torch.where(from_source, total.source, total.flagged)
        flagged_rank = torch.where(from_source, total.source_rank, total.flagged_rank)
        vitals = {
            "bad": bad,
            "non_finite": non_finite,
            "loss_high": loss_high,
            "grad_high": grad_high,
            "overflow": overflow,
            "flagged_ranks": flagged,
            "flagged_rank": torch.where(flagged == 1, flagged_rank, self._nobody),
            "loss": values[_LOSS],
            "grad_norm": values[_GRAD],
            "loss_mean": mean[_LOSS],
            "loss_std": std[_LOSS],
            "log_grad_mean": mean[_GRAD],
            "log_grad_std": std[_GRAD],
            "stop_requested": total.stop,
            "save_requested": total.save,
        }
        verdict = StepVerdict(
            found_inf=skip.float() if self.acts else torch.zeros_like(total.loss),
            gradient_overflow=bad_norm.float(),
            vitals=torch.stack([vitals[name].float() for name in VITALS]),
        )
        self._learn(values, good=~skip)
        return verdict

    def statistics(self) -> Tensor:
        """Their bits, in the order of ``STATISTICS``: int64 [5] on the device; equal on ranks that are sound."""
        together = torch.cat([self._count[None], self._mean, self._variance])
        return together.view(torch.int32).long()

    def state_dict(self) -> dict[str, Any]:
        """The statistics in JSON types. Host sync."""
        return {
            "count": self._count.item(),
            "mean": self._mean.tolist(),
            "variance": self._variance.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the statistics of an earlier run."""
        self._count.fill_(state["count"])
        self._mean.copy_(torch.tensor(state["mean"]))
        self._variance.copy_(torch.tensor(state["variance"]))

    def settle(self) -> None:
        """Forgets the statistics: after a rewind or with another batch size, the old ones say nothing."""
        for statistic in (self._count, self._mean, self._variance):
            statistic.zero_()

    def _measure(self, loss: Tensor, grad_norm: Tensor, features: Tensor | None) -> _Own:
        loss, grad_norm = loss.float(), grad_norm.float()
        loss_is_finite, norm_is_finite = loss.isfinite(), grad_norm.isfinite()
        std = torch.maximum(self._variance.sqrt(), self._floors)
        is_warm = self._count >= self._warmup
        statistics = torch.stack([self._mean, std])
        statistics_are_finite = statistics.isfinite().all()
        # Zero instead of what is not finite, which would spoil the sums.
        statistics = torch.where(statistics_are_finite, statistics, self._zero)
        loss = torch.where(loss_is_finite, loss, self._zero)
        grad_norm = torch.where(norm_is_finite, grad_norm, self._zero)
        grad_limit = self._mean[_GRAD] + self._thresholds[_GRAD] * std[_GRAD]
        grad_high = is_warm & (grad_norm.clamp_min(_SMALLEST_NORM).log() > grad_limit)
        flagged = (~(loss_is_finite & norm_is_finite) | grad_high).float()
        source = self._zero if features is None else (~features.isfinite()).float()
        requests, self._requests = self._requests, set()
        return _Own(
            *(loss, loss_is_finite.float(), grad_norm, norm_is_finite.float(), grad_high.float()),
            *(flagged, flagged * self._rank, source, source * self._rank),
            *(self._zero + float(request in requests) for request in (Request.STOP, Request.SAVE)),
            *(statistics_are_finite.float(), is_warm.float(), *statistics.unbind()),
        )

    def _learn(self, values: Tensor, *, good: Tensor) -> None:
        """Exponential means of good steps, and of their squared distances from the mean before them."""
        values = torch.stack([values[_LOSS], values[_GRAD].clamp_min(_SMALLEST_NORM).log()])
        change = torch.where(good, values - self._mean, self._zero).clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE)
        # The first value has no mean before it: the weight of the second wipes out what it left in the variance.
        self._variance += good * _weight(self._count, STD_WINDOW) * (change.square() - self._variance)
        self._mean += good * _weight(self._count + 1, MEAN_WINDOW) * change
        self._count += good


def _weight(count: Tensor, window: int) -> Tensor:
    """Of the newest among ``count`` values, so that those before the first count as nothing; 1 for the first."""
    rate = 1 / window
    return (rate / (1 - torch.pow(1 - rate, count))).clamp_max(1)
