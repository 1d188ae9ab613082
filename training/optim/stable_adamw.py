"""AdamW whose learning rate shrinks, tensor by tensor, where the second moment has lost track of the gradient.

Loss spikes follow steps in which the moving average of squared gradients is far below the squared gradient, so that the
update is far too large. StableAdamW measures that for each tensor and divides by it (update clipping):

    RMS_t = sqrt(mean(g^2 / max(v, eps^2)))        v: second moment, corrected for its bias
    eta_t = lr / max(1, RMS_t)
    theta <- theta - eta_t * wd * theta - eta_t * m / (sqrt(v) + eps)

With FSDP a rank has some rows of every tensor. RMS_t is that of the whole one: the ranks of a copy add up their
squares, for all tensors at once, between the update of the moments and that of the weights.

With RMS_t <= 1 it is AdamW. The state has AdamW's names and meaning: checkpoints of either load in the other.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models"
(arXiv 2304.13013), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor

from training.distributed.sharding import ShardSums

_CHUNK_ELEMENTS = 32 * 2**20
"""Tensors are updated together up to this many elements: it bounds the memory for intermediate values (256 MiB)."""
_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By size of an element."""


class StableAdamW(torch.optim.Optimizer):
    """Obeys ``found_inf`` and ``grad_scale`` as the fused AdamW does, and never waits for the device.

    ``found_inf`` (0-D, 0 or 1): with 1, parameters, moments and step counters stay as they are; gradients are zeroed.
    """

    _step_supports_amp_scaling = True
    """What GradScaler looks for in an optimizer that takes care of both itself."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        shard_sums: ShardSums | None = None,
    ) -> None:
        """
        Args:
            shard_sums: of a model whose parameters are spread over ranks; ``step`` is then collective.

        Raises:
            ValueError: a value outside of its range.
        """
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"StableAdamW with lr {lr} and weight decay {weight_decay}: neither may be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"StableAdamW with betas {betas}: give values from 0 to below 1 (--beta1, --beta2)")
        if eps <= 0:
            raise ValueError(f"StableAdamW with eps {eps}: it divides by it, so give a positive --eps")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._update_rms: dict[Tensor, Tensor] = {}
        self._shard_sums = shard_sums

    @property
    def update_rms(self) -> dict[Tensor, Tensor]:
        """RMS_t of the latest step by parameter: 0-D tensors on the device; 0 after a step that was skipped."""
        return dict(self._update_rms)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        chunks = (
            (chunk, group, None if found_inf is None else 1 - found_inf.to(chunk.device, torch.float32))
            for group in self.param_groups
            for chunk in self._chunks(group)
        )
        if self._shard_sums is None:
            for chunk, group, keep in chunks:
                roots = _update_moments(chunk, group, keep=keep, grad_scale=grad_scale)
                squares = _squared_ratios(chunk, roots, eps=group["eps"])
                self._update_weights(chunk, squares, roots, group=group, keep=keep)
        else:
            self._step_sharded([*chunks], self._shard_sums, grad_scale=grad_scale)
        return loss

    def _step_sharded(
        self,
        chunks: Sequence[tuple[_Chunk, dict[str, Any], Tensor | None]],
        shard_sums: ShardSums,
        *,
        grad_scale: Tensor | None,
    ) -> None:
        """Moments of all chunks, one exchange, weights of all chunks. The roots in between are computed twice."""
        own = []
        for chunk, group, keep in chunks:
            roots = _update_moments(chunk, group, keep=keep, grad_scale=grad_scale)
            own.append(_squared_ratios(chunk, roots, eps=group["eps"]))
        parameters = [parameter for chunk, _, _ in chunks for parameter in chunk.parameters]
        totals = shard_sums.of_each(own, parameters)  # collective: all ranks
        for (chunk, group, keep), squares in zip(chunks, totals, strict=True):
            roots = _roots_of_second_moments(chunk, torch.stack(chunk.steps), beta2=group["betas"][1])
            self._update_weights(chunk, squares, roots, group=group, keep=keep)

    def _update_weights(
        self, chunk: _Chunk, squares: Tensor, roots: list[Tensor], *, group: dict[str, Any], keep: Tensor | None
    ) -> None:
        sizes = [
            parameter.numel() if self._shard_sums is None else self._shard_sums.size(parameter)
            for parameter in chunk.parameters
        ]
        rms = torch.stack(torch._foreach_div(list(squares.unbind()), [float(max(1, size)) for size in sizes])).sqrt()
        _update_weights(chunk, rms, roots, group=group, keep=keep)
        self._update_rms.update(zip(chunk.parameters, rms.unbind(), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this optimizer's state, or AdamW's, whose step counters may be on the host."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)

    def _chunks(self, group: dict[str, Any]) -> Iterator[_Chunk]:
        """The parameters that have gradients, in order, by device and type, and not too many at a time."""
        chunk, elements = _Chunk([], [], [], [], []), 0
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if chunk.parameters and (
                elements + parameter.numel() > _CHUNK_ELEMENTS
                or (parameter.device, parameter.dtype) != (chunk.parameters[-1].device, chunk.parameters[-1].dtype)
            ):
                yield chunk
                chunk, elements = _Chunk([], [], [], [], []), 0
            state = self._state(parameter)
            chunk.parameters.append(parameter)
            chunk.gradients.append(parameter.grad)
            chunk.exp_avgs.append(state["exp_avg"])
            chunk.exp_avg_sqs.append(state["exp_avg_sq"])
            chunk.steps.append(state["step"])
            elements += parameter.numel()
        if chunk.parameters:
            yield chunk

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = cast(dict[str, Tensor], self.state[parameter])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


class _Chunk(NamedTuple):
    """Tensors that are updated together; entry i of each list belongs to parameter i."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device


def _update_moments(
    chunk: _Chunk, group: dict[str, Any], *, keep: Tensor | None, grad_scale: Tensor | None
) -> list[Tensor]:
    """The first half of an update, in place; returns what ``_roots_of_second_moments`` does.

    What is one number per tensor (step, RMS_t, rate) is computed for all T tensors of the chunk as one vector: a kernel
    each would cost more than the update itself. Only where such numbers meet their tensors (three times below) the
    device gets one kernel per tensor, for want of a foreach operation; all other operations take a list in a few.

    Args:
        keep: 0-D; 0 turns every factor below into one that changes nothing, exactly.
    """
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = chunk
    beta1, beta2 = group["betas"]
    if grad_scale is not None:
        torch._foreach_div_(gradients, grad_scale)
    if keep is None:
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(exp_avgs, beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
    else:
        _zero_unless(keep, gradients)
        torch._foreach_add_(steps, [keep] * len(steps))  # a list: a single tensor would be read as a number
        torch._foreach_mul_(exp_avgs, 1 - (1 - beta1) * keep)
        torch._foreach_mul_(exp_avg_sqs, 1 - (1 - beta2) * keep)
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)

    return _roots_of_second_moments(chunk, torch.stack(steps), beta2=beta2)


def _roots_of_second_moments(chunk: _Chunk, step: Tensor, *, beta2: float) -> list[Tensor]:
    """sqrt(v) of each tensor. ``step``: [T]."""
    roots = torch._foreach_div(chunk.exp_avg_sqs, bias_correction(step, beta2).unbind())  # one kernel per tensor
    torch._foreach_sqrt_(roots)
    return list(roots)


def _squared_ratios(chunk: _Chunk, roots: list[Tensor], *, eps: float) -> Tensor:
    """Sum over each tensor (or what this rank has of it) of g^2 / max(v, eps^2): [T]."""
    ratios = torch._foreach_clamp_min(roots, eps)
    torch._foreach_reciprocal_(ratios)
    torch._foreach_mul_(ratios, chunk.gradients)  # g / sqrt(max(v, eps^2))
    return torch.stack(torch._foreach_norm(ratios, dtype=torch.float32)).square()


def _update_weights(
    chunk: _Chunk, rms: Tensor, roots: list[Tensor], *, group: dict[str, Any], keep: Tensor | None
) -> None:
    """The second half, in place; ``roots`` are used up."""
    parameters, _, exp_avgs, _, steps = chunk
    step = torch.stack(steps)  # [T]
    rate = rms.clamp_min(1.0).reciprocal() * group["lr"]  # eta_t, [T]
    if keep is not None:
        rate *= keep
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, (1 - group["weight_decay"] * rate).unbind())  # one kernel per tensor
    torch._foreach_add_(roots, group["eps"])
    ratios = torch._foreach_div(exp_avgs, roots)
    torch._foreach_mul_(ratios, (rate / bias_correction(step, group["betas"][0])).unbind())  # one kernel per tensor
    torch._foreach_sub_(parameters, ratios)


def _zero_unless(keep: Tensor, gradients: list[Tensor]) -> None:
    """With ``keep`` 0, zeroes in place of whatever they are: their bits times 0, for NaN times 0 is NaN."""
    integers = _INTEGERS[gradients[0].element_size()]
    torch._foreach_mul_([gradient.view(integers) for gradient in gradients], keep.to(integers))


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """1 - beta^step, to fp32's precision also where beta^step is close to 1.

    A step that was skipped before all others counts as the first, to not divide by zero.
    """
    return -torch.expm1(step.clamp_min(1) * (math.log(beta) if beta else -math.inf))
