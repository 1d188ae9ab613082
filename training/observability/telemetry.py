"""Every n steps, how stable training is: updates, gradients and activations, by tensor, block and tower.

    after an update, before the gradients are cleared
    weights, gradients, moments -> UpdateMeter ------> one vector -> one copy to the host -> names and numbers
    the batch's first samples --> ActivationProbe --/

No collective, but with FSDP: there all ranks measure together. What comes from weights, gradients and moments is equal
on all ranks; what comes from samples (``feature_norm``, ``attention_logit_max``) and ``device_memory_gib`` is this
rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from models.clip import Clip
from models.packing import PackedTexts
from training.data.batch import DeviceBatch
from training.distributed.sharding import local_parameters, reshard, shard_sums
from training.observability.activation_probe import ActivationProbe
from training.observability.update_statistics import UpdateMeter, UpdateStatistics

PREFIX = "telemetry/"
HIGH_UPDATE_RMS = 2.3
"""RMS_t that announces a loss spike. Source: Wortsman et al. 2023, arXiv 2304.13013, section 3.4."""
HIGH_SHARE = f"{PREFIX}update_rms_high_share"
"""Name of the share of tensors above it: replicated."""
PATCH_EMBEDDING_RMS = f"{PREFIX}update_rms_patch_embedding"
_SAMPLES = 2


class Telemetry:
    """Measures the step just made. It changes nothing: not weights, gradients, buffers, or random numbers."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """
        Args:
            model: the plain model (``unwrap`` it first).
            every: steps between measurements; 0 is never.
            autocast: of the run's precision.
        """
        self._every = every
        self._model = model
        parameters = {name: value for name, value in local_parameters(model).items() if value.requires_grad}
        self._blocks = block_names(model)
        self._patch_embedding = _patch_embedding(model)
        self._meter = UpdateMeter(parameters, optimizer, shard_sums=shard_sums(model))
        self._probe = ActivationProbe(model, autocast=autocast) if every and isinstance(model, Clip) else None

    def is_due(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is measured."""
        return self._every > 0 and step % self._every == 0

    def measure(self, batch: DeviceBatch, *, skipped: Tensor | None = None) -> dict[str, float]:
        """Numbers by name, for the step just made. One host sync.

        A step that was skipped, or whose gradients are not finite, has no update: the rest is still measured.

        Args:
            batch: of which the first samples go through the updated model once more.
            skipped: 0-D, above 0 if the optimizer left the weights alone.
        """
        with torch.no_grad():
            statistics = self._meter.measure()
            scalars = {"logit_scale": cast(Tensor, self._model.logit_scale).exp().squeeze()}
            if self._probe is not None:
                reshard(self._model)  # the probe is to see the weights after the update
                texts = batch.texts
                few = texts.first(_SAMPLES) if isinstance(texts, PackedTexts) else texts[:_SAMPLES]
                scalars |= self._probe.measure(batch.images[:_SAMPLES], few)
            vectors = [torch.stack([value.float() for value in scalars.values()])]
            vectors += [torch.zeros_like(vectors[0][:1]) if skipped is None else skipped.reshape(1).float()]
            columns = {name: column.to(vectors[0].device) for name, column in _columns(statistics).items()}
            numbers: list[float] = torch.cat([*vectors, *columns.values()]).tolist()  # host sync
        measured = dict(zip(scalars, numbers, strict=False)) | _device_memory(batch.images.device)
        was_skipped, rest = numbers[len(scalars)], numbers[len(scalars) + 1 :]
        if statistics is not None and not was_skipped:
            count = len(statistics.names)
            table = {name: rest[place * count : (place + 1) * count] for place, name in enumerate(columns)}
            measured |= self._describe(statistics.names, table)
        return {f"{PREFIX}{name}": value for name, value in measured.items()}

    def _describe(self, names: Sequence[str], table: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Tensors and blocks; empty if a gradient is not finite."""
        grads = dict(zip(names, table["grad_norm"], strict=True))
        if not all(abs(value) < float("inf") for value in grads.values()):
            return {}
        by_block = self._norms_by_block(grads)
        measured = {f"grad_norm/{block}": norm for block, norm in by_block.items()}
        if "update_rms" not in table:
            return measured
        rms = dict(zip(names, table["update_rms"], strict=True))
        measured |= {f"update_rms/{name}": value for name, value in rms.items()}
        measured["update_rms_max"] = max(rms.values())
        measured["update_rms_high_share"] = sum(value > HIGH_UPDATE_RMS for value in rms.values()) / len(rms)
        if self._patch_embedding in rms:
            measured["update_rms_patch_embedding"] = rms[self._patch_embedding]
        measured["second_moment_min"] = min(table["second_moment"])
        weights = self._norms_by_block(dict(zip(names, table["weight_norm"], strict=True)))
        updates = self._norms_by_block(dict(zip(names, table["update_norm"], strict=True)))
        return measured | {f"update_ratio/{block}": updates[block] / max(weights[block], 1e-30) for block in weights}

    def _norms_by_block(self, norms: Mapping[str, float]) -> dict[str, float]:
        squares: dict[str, float] = {}
        for name, norm in norms.items():
            block = self._blocks[name]
            squares[block] = squares.get(block, 0.0) + norm * norm
        return {block: total**0.5 for block, total in squares.items()}


def block_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> what it is reported with: ``image/block_03``, ``image/conv1``, ``text/ln_final``."""
    blocks: dict[int, str] = {}
    for tower in ("image", "text"):
        for number, block in enumerate(getattr(model, f"{tower}_blocks", ())):
            blocks |= {id(parameter): f"{tower}/block_{number:02d}" for parameter in block.parameters()}
    return {name: blocks.get(id(value)) or _module_name(name) for name, value in model.named_parameters()}


def _module_name(parameter_name: str) -> str:
    """``visual.conv1.weight`` -> ``image/conv1``; parameters of the model itself keep their names."""
    if parameter_name in ("logit_scale", "logit_bias"):
        return parameter_name
    tower = "image" if parameter_name.startswith("visual.") else "text"
    path = parameter_name.removeprefix("visual.").removeprefix("text.").split(".")
    return f"{tower}/{'.'.join(path[:-1] or path)}"


def _patch_embedding(model: nn.Module) -> str | None:
    """The first convolution of the image tower: where a second moment that lags shows first."""
    for name, parameter in model.named_parameters():
        if name.startswith("visual.") and parameter.ndim == 4:
            return name
    return None


def _columns(statistics: UpdateStatistics | None) -> dict[str, Tensor]:
    if statistics is None:
        return {}
    fields = statistics._asdict()
    del fields["names"]
    return {name: value for name, value in fields.items() if value is not None}


def _device_memory(device: torch.device) -> dict[str, float]:
    """Most memory that tensors had at once since the start; only a GPU's allocator knows."""
    if device.type != "cuda":
        return {}
    return {"device_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
