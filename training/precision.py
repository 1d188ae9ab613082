"""What each ``--precision`` means: the type of weights, inputs and autocast, one table row per value.

In every row the model normalises features, and the loss computes logits, in at least fp32.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """One row of the table, on one type of device."""

    name: str
    autocast_dtype: torch.dtype | None = None
    """Computation inside ``autocast()``; the weights stay fp32 (master weights)."""
    weight_dtype: torch.dtype = torch.float32
    """Type of the weights that ``cast_parameters`` lowers."""
    keep_sensitive_float32: bool = True
    """With a lower ``weight_dtype``: LayerNorm, embeddings and the temperature stay fp32."""
    scales_gradients: bool = False
    """fp16 gradients underflow below 6e-8, so the loss is scaled up and a step with an overflow is skipped."""
    device_type: str = "cpu"

    @property
    def input_dtype(self) -> torch.dtype:
        """Type of the images that the model is given."""
        return self.weight_dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """For forward passes, in training and evaluation. Enter it once per forward pass: it caches cast weights."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of this precision, if it has one. Its state belongs into checkpoints."""
        return torch.amp.GradScaler(self.device_type) if self.scales_gradients else None


_AMP_BF16 = Precision("amp_bf16", autocast_dtype=torch.bfloat16)

PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        _AMP_BF16,
        Precision("amp_bfloat16", autocast_dtype=torch.bfloat16),
        Precision("amp", autocast_dtype=torch.float16, scales_gradients=True),
        Precision("fp32"),
        # No master weights in the rows below: the optimizer's moments have the precision of the weights, too.
        Precision("bf16", weight_dtype=torch.bfloat16),
        Precision("fp16", weight_dtype=torch.float16),
        Precision("pure_bf16", weight_dtype=torch.bfloat16, keep_sensitive_float32=False),
        Precision("pure_fp16", weight_dtype=torch.float16, keep_sensitive_float32=False),
    )
}


def build_precision(name: str, device: torch.device) -> Precision:
    """The row of a ``--precision`` value for a device.

    Raises:
        ValueError: an unknown value.
    """
    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: unknown; give one of {', '.join(PRECISIONS)}")
    row = PRECISIONS[name]
    return Precision(
        row.name, row.autocast_dtype, row.weight_dtype, row.keep_sensitive_float32, row.scales_gradients, device.type
    )


# What OpenCLIP lowers in models of its own code beside Linear and convolutions: parameters with these names.
_LOWERED_PARAMETERS = frozenset(
    {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
    | {"text_projection", "proj"}
)
_LOWERED_MODULES = (nn.Conv1d, nn.Conv2d, nn.Linear)
_OWN_PACKAGES = ("models", "open_clip")


def cast_parameters(model: nn.Module, precision: Precision) -> None:
    """Lowers the weights that the precision lowers, in place: call it before the optimizer is built.

    The same parameters as in OpenCLIP: for its own towers what multiplies (Linear, convolutions, attention,
    projections); for a model with a timm trunk everything except the LayerNorms outside of timm's code.
    """
    dtype = precision.weight_dtype
    if dtype == torch.float32:
        return
    if not precision.keep_sensitive_float32:
        model.to(dtype)
    elif _has_timm_trunk(model):
        model.to(dtype)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and _package(module) in _OWN_PACKAGES:
                module.float()
    else:
        for module in model.modules():
            _lower_what_multiplies(module, dtype)


def _lower_what_multiplies(module: nn.Module, dtype: torch.dtype) -> None:
    lowers_all = isinstance(module, _LOWERED_MODULES)
    for name, parameter in module.named_parameters(recurse=False):
        if (lowers_all and name in ("weight", "bias")) or name in _LOWERED_PARAMETERS:
            parameter.data = parameter.data.to(dtype)


def _has_timm_trunk(model: nn.Module) -> bool:
    return hasattr(getattr(model, "visual", None), "trunk")


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
