"""How far a step's gradients and features are from exact ones: the evidence in low precision, where curves are chaotic.

    exact   the rival's model, eager, in fp32 or fp64; in pieces of rows, with the loss over all of them
    found   what an arm's own timed program leaves behind: autocast, compiled, packed

Rounding in bf16 moves a loss by so little, and a wrong program may move it by so little, that losses tell nothing.
Whole gradients do: bf16 moves them by a few percent, other weights, texts or masks by all of their length.
Legend: B batch, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.data.batch import DeviceBatch
from training.distributed.collectives import all_reduce_sum, world_size

ROWS = 32
"""Of a batch in one piece: activations in full precision need a multiple of the memory that a step has."""
_TEMPERATURE = ("logit_scale", "logit_bias")


class Pass(NamedTuple):
    """What one forward and backward pass leaves behind."""

    image_features: Tensor
    """[B, E]"""
    text_features: Tensor
    gradients: dict[str, Tensor]
    """By parameter."""


class Distance(NamedTuple):
    """From exact gradients and features, relative."""

    image: float
    """Of the image tower's whole gradient: |found - exact| / |exact|, L2."""
    text: float
    whole: float
    """Of all parameters, the temperature among them."""
    cosine: float
    """Of the features of a row, the worst."""


@contextmanager
def exact_matmul() -> Iterator[None]:
    """TF32 off inside: its rounding is larger than the tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def exact_pass(model: nn.Module, batch: DeviceBatch, loss: Callable[..., Any], *, dtype: torch.dtype) -> Pass:
    """One pass of a copy of OpenCLIP's model, which keeps its own. Collective: all ranks.

    The gradient of the loss is cut at the features, as in accumulation: exact, and one piece in memory at a time.

    Args:
        batch: normalised images and padded texts on the device.
        loss: OpenCLIP's, over all ranks' features.
    """
    with exact_matmul(), torch.autocast(batch.images.device.type, enabled=False):
        assert isinstance(batch.texts, Tensor)
        twin = deepcopy(model).to(dtype)
        twin.zero_grad(set_to_none=True)
        rows = len(batch.images) if any(isinstance(part, _BatchNorm) for part in twin.modules()) else ROWS
        pieces = list(zip(batch.images.to(dtype).split(rows), batch.texts.split(rows), strict=True))
        with torch.no_grad():
            outputs: list[Mapping[str, Tensor]] = [twin(images, texts) for images, texts in pieces]
        leaves = {name: torch.cat([output[name] for output in outputs]) for name in ("image_features", "text_features")}
        leaves |= {name: outputs[0][name] for name in _TEMPERATURE if outputs[0].get(name) is not None}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
        loss(**leaves).backward()
        for number, (images, texts) in enumerate(pieces):
            output = twin(images, texts)
            own = slice(number * rows, (number + 1) * rows)
            cut = {name: _gradient(leaves[name])[own] for name in ("image_features", "text_features")}
            if number == 0:  # of the temperature once
                cut |= {name: _gradient(leaves[name]) for name in leaves if name in _TEMPERATURE}
            torch.autograd.backward([output[name] for name in cut], list(cut.values()))
        gradients = take_gradients(twin)
        for gradient in gradients.values() if world_size() > 1 else ():
            gradient.copy_(all_reduce_sum(gradient) / world_size())  # the mean, as DDP leaves it
    return Pass(leaves["image_features"].detach(), leaves["text_features"].detach(), gradients)


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of the last backward pass; the model has none afterwards."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found: Pass, exact: Pass) -> Distance:
    """Over whole towers: a parameter's own relative error says little where its gradient is nearly nothing."""
    towers: dict[str, tuple[float, float]] = {}
    for name, right in exact.gradients.items():
        apart = (found.gradients[name].to(right.dtype) - right).double().square().sum().item()
        before = towers.get(tower_of(name), (0.0, 0.0))
        towers[tower_of(name)] = (before[0] + apart, before[1] + right.double().square().sum().item())
    total = (sum(apart for apart, _ in towers.values()), sum(length for _, length in towers.values()))
    cosines = [
        torch.cosine_similarity(mine.to(right.dtype), right, dim=-1).min()
        for mine, right in zip(found[:2], exact[:2], strict=True)
    ]
    image, text, whole = ((apart / length) ** 0.5 for apart, length in (towers["image"], towers["text"], total))
    return Distance(image, text, whole, torch.stack(cosines).min().item())


def tower_of(parameter: str) -> str:
    """Whose parameter it is."""
    if parameter in _TEMPERATURE:
        return "temperature"
    return "image" if parameter.startswith("visual.") else "text"


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
