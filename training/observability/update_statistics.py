"""What the last update did to each tensor: norms of gradient, weight and update, and how far AdamW was surprised.

One pass over weights, gradients and moments, in chunks of bounded size: the temporaries need a few MB, whatever the
model. Nothing waits for the device. Nothing is exchanged either, for on replicas that agree the results agree; only
with FSDP the ranks of a copy add up what they found in their rows.

    RMS_t = sqrt(mean(g^2 / max(v, eps^2)))        per tensor, g the gradient that the optimizer was given

with v as AdamW divides by it: after this step's gradient went in, and corrected for its start at zero, so that a
steady tensor has 1 from the first step on. Far above 1 the second moment lags behind the gradients.
Source: Wortsman et al. 2023, arXiv 2304.13013, algorithm 2 and section 3.4.

Legend: T trained tensors with a gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from training.distributed.sharding import ShardSums
from training.optim.stable_adamw import StableAdamW, bias_correction

logger = logging.getLogger(__name__)

_CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}
"""Elements per chunk: two temporaries of it fit a core's cache, or fill a GPU."""


class UpdateStatistics(NamedTuple):
    """fp32 [T] on the device, in the order of ``names``."""

    names: tuple[str, ...]
    grad_norm: Tensor
    weight_norm: Tensor
    update_rms: Tensor | None
    """None for optimizers without a second moment; so is what follows."""
    update_norm: Tensor | None
    """Of what was added to the weights, without weight decay."""
    second_moment: Tensor | None
    """Mean over the tensor. Its smallest element says nothing: words never seen have 0."""


class _Slot(NamedTuple):
    """A tensor, and how its group is optimised."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]


class _Piece(NamedTuple):
    """A flat stretch of one tensor."""

    slot: int
    start: int
    length: int


class UpdateMeter:
    """Measures the last step of an optimizer. Call it before the gradients are cleared."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        shard_sums: ShardSums | None = None,
    ) -> None:
        """
        Args:
            shard_sums: of a model whose parameters are spread over ranks; ``measure`` is then collective.
        """
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self._optimizer = optimizer
        self._shard_sums = shard_sums
        self._slots = [_Slot(name, value, groups[value]) for name, value in named_parameters.items() if value in groups]
        # Where the pieces of each tensor go; made once, because a copy from the host would wait for the device.
        self._layouts: dict[tuple[int, ...], Tensor] = {}
        self._has_warned = False

    def measure(self) -> UpdateStatistics | None:
        """None before the first step. No host sync."""
        present = tuple(index for index, slot in enumerate(self._slots) if slot.parameter.grad is not None)
        if not present:
            return None
        slots = [self._slots[index] for index in present]
        has_moments = all(_has_moments(self._optimizer.state[slot.parameter]) for slot in slots)
        if not has_moments and not self._has_warned:
            self._has_warned = True
            name = type(self._optimizer).__name__
            logger.info("Telemetry: no update RMS and no update norms with %s, which keeps no two moments.", name)
        pieces, columns = [], []
        for chunk in _chunks(slots):
            pieces += chunk
            columns.append(torch.stack(self._measure_chunk(slots, chunk, has_moments=has_moments)))
        # With shards in host memory columns come from there and from the device.
        device = columns[0].device if self._shard_sums is None else self._shard_sums.device
        if present not in self._layouts:
            self._layouts[present] = torch.tensor([piece.slot for piece in pieces], device=device)
        rows = torch.cat([column.to(device) for column in columns], dim=1)  # [Q, pieces]; Q sums over each piece
        sums = rows.new_zeros(len(rows), len(slots)).index_add_(1, self._layouts[present], rows)  # -> [Q, T]
        if self._shard_sums is not None:
            sums = self._shard_sums(sums, [slot.parameter for slot in slots])  # collective: all ranks
        return self._finish(slots, sums, has_moments=has_moments)

    def _measure_chunk(self, slots: Sequence[_Slot], chunk: Sequence[_Piece], *, has_moments: bool) -> list[Tensor]:
        """Sums over each piece, [pieces] each; all pieces are of one group, type and device."""
        grads = [_cut(cast(Tensor, slots[piece.slot].parameter.grad), piece) for piece in chunk]
        weights = [_cut(slots[piece.slot].parameter.detach(), piece) for piece in chunk]
        sums = [_squares(grads), _squares(weights)]
        if not has_moments:
            return sums
        first = slots[chunk[0].slot]
        state, group = self._optimizer.state, first.group
        moments = [state[slots[piece.slot].parameter] for piece in chunk]
        second = [_cut(moment["exp_avg_sq"], piece) for moment, piece in zip(moments, chunk, strict=True)]
        means = [_cut(moment["exp_avg"], piece) for moment, piece in zip(moments, chunk, strict=True)]
        # All tensors of a group have made the same number of steps: bad steps are skipped for all of them.
        correction = _correction(moments[0]["step"], group["betas"][1], device=first.parameter.device)
        roots = torch._foreach_div(second, correction)
        torch._foreach_sqrt_(roots)
        sums.append(_squares(roots))
        surprise = torch._foreach_div(grads, torch._foreach_clamp_min(roots, group["eps"]))
        sums.append(_squares(surprise))
        del surprise  # its memory is the next line's
        torch._foreach_add_(roots, group["eps"])
        sums.append(_squares(torch._foreach_div(means, roots)))
        return sums

    def _finish(self, slots: Sequence[_Slot], sums: Tensor, *, has_moments: bool) -> UpdateStatistics:
        names = tuple(slot.name for slot in slots)
        if not has_moments:
            grads, weights = sums.sqrt().unbind()
            return UpdateStatistics(names, grads, weights, None, None, None)
        grads, weights, second, surprise, updates = sums.unbind()
        sizes = [float(self._size(slot.parameter)) for slot in slots]
        rms = torch.stack(torch._foreach_div(list(surprise.unbind()), sizes)).sqrt()
        norms = updates.sqrt() * self._step_sizes(slots, device=sums.device)
        if isinstance(self._optimizer, StableAdamW):
            norms = norms / rms.clamp_min(1.0)
        second = torch.stack(torch._foreach_div(list(second.unbind()), sizes))
        return UpdateStatistics(names, grads.sqrt(), weights.sqrt(), rms, norms, second)

    def _size(self, parameter: nn.Parameter) -> int:
        return parameter.numel() if self._shard_sums is None else self._shard_sums.size(parameter)

    def _step_sizes(self, slots: Sequence[_Slot], *, device: torch.device) -> Tensor:
        """Learning rate over the first moment's bias correction, by tensor: [T]."""
        sizes: dict[int, Tensor] = {}
        for slot in slots:
            if id(slot.group) not in sizes:
                step = self._optimizer.state[slot.parameter]["step"]
                correction = _correction(step, slot.group["betas"][0], device=device)
                sizes[id(slot.group)] = slot.group["lr"] / correction
        return torch.stack([sizes[id(slot.group)] for slot in slots])


def _has_moments(state: Mapping[str, Any]) -> bool:
    return {"exp_avg", "exp_avg_sq", "step"} <= state.keys()


def _correction(step: Tensor | float, beta: float, *, device: torch.device) -> Tensor:
    """1 - beta^step, 0-D. Fused optimizers count steps on the device, the others on the host."""
    step = step if isinstance(step, Tensor) else torch.tensor(float(step))
    return bias_correction(step.float(), beta).to(device, non_blocking=True)


def _chunks(slots: Sequence[_Slot]) -> Iterator[list[_Piece]]:
    """Pieces of tensors of one group, type and device, together not much longer than a chunk."""
    kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for index, slot in enumerate(slots):
        kinds.setdefault((id(slot.group), slot.parameter.dtype, slot.parameter.device), []).append(index)
    limit = _CHUNK_ELEMENTS.get(slots[0].parameter.device.type, _CHUNK_ELEMENTS["cuda"])
    for indices in kinds.values():
        chunk: list[_Piece] = []
        elements = 0
        for index in indices:
            size = slots[index].parameter.numel()
            for start in range(0, size, limit):
                length = min(limit, size - start)
                if chunk and elements + length > limit:
                    yield chunk
                    chunk, elements = [], 0
                chunk.append(_Piece(index, start, length))
                elements += length
        if chunk:
            yield chunk


def _cut(tensor: Tensor, piece: _Piece) -> Tensor:
    return tensor.detach().reshape(-1)[piece.start : piece.start + piece.length]


def _squares(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Sum of squares of each tensor, fp32 [pieces]."""
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square()
