"""Applies the gradients of one step: to everything, or to nothing if the step was bad.

    gradients -> unscale -> norm -> verdict of the guard -> clip -> optimizer -> clamp of the temperature

A bad step leaves weights, moments, the optimizer's step counter and BatchNorm's running statistics as they were, which
is what a run without that batch would have. The host does not learn of it here: the decision stays on the device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.distributed.sharding import local_parameters, shard_sums
from training.resilience.guard import StepGuard, StepVerdict

logger = logging.getLogger(__name__)

MAX_LOG_LOGIT_SCALE = math.log(100)
"""The temperature may sharpen logits at most 100 times (Radford et al. 2021, section 2.5)."""


class UpdateResult(NamedTuple):
    """0-D grad_norm and 1-D vitals, on the device."""

    grad_norm: Tensor
    """L2 norm of all gradients before clipping."""
    vitals: Tensor | None
    """What the guard measured; None without a guard."""


class Update:
    """Callable that turns gradients into new weights. With a guard all ranks must call it together."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        grad_clip_norm: float | None,
        guard: StepGuard | None,
    ) -> None:
        """
        Args:
            model: the plain one.
        """
        self._optimizer = optimizer
        self._scaler = scaler
        self._grad_clip_norm = grad_clip_norm
        self._guard = guard
        self._guard_acts = guard is not None and guard.acts
        self._parameters = [parameter for parameter in local_parameters(model).values() if parameter.requires_grad]
        self._in_host_memory = any(parameter.device.type == "cpu" for parameter in self._parameters)
        self._shard_sums = shard_sums(model)
        self._logit_scale = cast(Tensor, model.logit_scale)
        self._statistics = RunningStatistics(model)
        if self._guard_acts and not skips_on_device(optimizer):
            logger.warning(
                "%s cannot leave out a step that is bad by itself: the host waits for the device at every step to "
                "learn the verdict. --opt adamw and stableadamw need not, and --guard off does without the verdict.",
                type(optimizer).__name__,
            )

    def prepare(self) -> None:
        """Remembers what the forward pass changes by itself. Call it before."""
        if self._guard_acts:
            self._statistics.save()

    def __call__(self, *, loss: Tensor, features: Tensor) -> UpdateResult:
        """Updates the weights once.

        Args:
            loss: of this rank, 0-D.
            features: sum of the features that this rank computed, 0-D.
        """
        self._scaler.unscale_(self._optimizer)  # clipping and the norm are about true gradients
        # Reads each gradient once: well below one per cent of a step, and the first thing to look at in a bad run.
        grad_norm = self._grad_norm()
        verdict = None
        if self._guard is not None:
            verdict = self._guard.judge(  # collective: all ranks
                loss, grad_norm, features=features, overflow_is_normal=self._scaler.is_enabled()
            )
        if self._grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip_norm, grad_norm)
        if verdict is not None and self._guard_acts:
            self._step(verdict)
        else:
            if self._shard_sums is not None:
                # This rank's rows may be finite where another's are not.
                self._share_overflow((~grad_norm.isfinite()).float())
            self._scaler.step(self._optimizer)  # leaves the weights alone if a scaled gradient overflowed
        self._scaler.update()
        with torch.no_grad():
            self._logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
        return UpdateResult(grad_norm, None if verdict is None else verdict.vitals)

    def _grad_norm(self) -> Tensor:
        gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        if self._shard_sums is not None:
            return self._shard_sums.norm(gradients)  # collective: all ranks
        return nn.utils.get_total_norm([gradient for _, gradient in gradients])

    def _share_overflow(self, overflow: Tensor) -> None:
        if self._scaler.is_enabled():
            for found in self._scaler._found_inf_per_device(self._optimizer).values():
                found.copy_(overflow)

    def _step(self, verdict: StepVerdict) -> None:
        self._statistics.restore_where(verdict.found_inf)
        # What this rank saw is not enough: with another scale than the others it would average other gradients.
        self._share_overflow(verdict.gradient_overflow)
        if skips_on_device(self._optimizer):
            optimizer = cast(Any, self._optimizer)
            # Shards that FSDP keeps in host memory are updated there, by a verdict that must have arrived: host sync.
            found_inf = verdict.found_inf.cpu() if self._in_host_memory else verdict.found_inf
            optimizer.found_inf, optimizer.grad_scale = found_inf, None
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf, optimizer.grad_scale
        # Only not calling them keeps other optimizers from stepping, and for that the host must know.
        elif not verdict.found_inf.item():  # host sync
            self._optimizer.step()


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` obeys ``optimizer.found_inf``, a tensor, without reading it: fused ones, and StableAdamW."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class RunningStatistics:
    """BatchNorm's running mean, variance and count: what a forward pass changes without being asked."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._saved: list[Tensor] = []

    def save(self) -> None:
        """Remembers them."""
        self._saved = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Puts back what was saved."""
        for buffer, before in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(before)

    def restore_where(self, flag: Tensor) -> None:
        """The same if the 0-D ``flag`` is 1, without the host's knowing."""
        for buffer, before in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(torch.where(flag.bool(), before, buffer))


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, BatchNorm's statistics are as before afterwards."""
    statistics = RunningStatistics(model)
    statistics.save()
    try:
        yield
    finally:
        statistics.restore()
