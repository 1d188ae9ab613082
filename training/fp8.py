"""Computes the linear layers of blocks in fp8 (``--fp8``): half the bytes and twice the peak rate, and other numbers.

torchao scales the inputs, weights and gradients of a layer to what 8 bits can hold, each time anew:

    tensorwise   one scale per tensor: the fastest
    rowwise      one scale per row, rounded to a power of two: closer to bf16

Weights, optimizer states and checkpoints are those of a run without: only products are computed in fp8, and only in
training. An evaluation computes as whoever loads the checkpoint will.

    computed in fp8    nn.Linear inside blocks: MLPs, output projections of attention; in timm's towers QKV as well
    left as it is      QKV of our towers (a parameter of attention, not a layer), attention itself, convolutions, stem,
                       heads, everything outside of blocks, and layers with a side that is no multiple of 16
"""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.packing import token_multiple

logger = logging.getLogger(__name__)

RECIPES = ("tensorwise", "rowwise")
_MULTIPLE = 16
"""Of which every side of a product must be one: a rule of the hardware's fp8 instructions."""
_FIRST_CAPABILITY = (8, 9)
"""Ada; Hopper is (9, 0)."""


class Conversion(NamedTuple):
    """What became of the linear layers inside blocks: their names within the list of blocks."""

    converted: tuple[str, ...]
    left: tuple[str, ...]
    """A side is no multiple of 16."""


def check_fp8(recipe: str, *, device: torch.device) -> None:
    """Whether this process can compute in fp8.

    Raises:
        ValueError: the device cannot, or torchao is missing.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if reason := refusal(device.type, capability, name=name, has_torchao=find_spec("torchao") is not None):
        raise ValueError(f"--fp8 {recipe} {reason}, or leave the flag out")


def refusal(device_type: str, capability: tuple[int, int] | None, *, name: str = "", has_torchao: bool) -> str | None:
    """Why fp8 is out of reach, and what would help; None if it is not."""
    if capability is None:
        return f"needs a GPU with fp8 products, and the device is {device_type}: train on one (Ada, Hopper or later)"
    if capability < _FIRST_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, _FIRST_CAPABILITY))
        return f"needs a GPU of compute capability {needed} (Ada, Hopper or later), and {name} has {found}: use another"
    if not has_torchao:
        return "needs torchao: pip install 'clipyard[fp8]'"
    return None


def padded_blocks(count: int, *, batch_size: int, text_length: int) -> range:
    """Numbers of the blocks whose products need padding, of ``count``, the text tower's behind the image tower's.

    The rows of a product are those of all sequences together, and have to be a multiple of 16. The last block computes
    one for each caption, and packed captions have a few fillers with them: those rows are no multiple in any case.

    Args:
        batch_size: of a micro-batch.
        text_length: tokens that captions are padded or cut to.
    """
    is_aligned = batch_size % _MULTIPLE == 0 and token_multiple(batch_size, text_length) % _MULTIPLE == 0
    return range(count - 1 if is_aligned else 0, count)


def convert_blocks(
    blocks: Sequence[nn.Module], recipe: str, *, padded: Container[int] = (), emulated: bool = False
) -> Conversion:
    """Replaces the linear layers inside blocks, in place; parameters and their names stay.

    Call it before the blocks are checkpointed or compiled.

    Args:
        padded: numbers of blocks whose rows are padded to a multiple of 16, at the price of copies.
        emulated: round to fp8 and multiply in fp32, on any device: to study numbers, not for speed.

    Raises:
        ValueError: there is nothing to convert.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    plain = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulated)
    converted: list[str] = []
    left: list[str] = []
    for number, block in enumerate(blocks):
        fitting = fitting_layers(block)
        left += [f"{number}.{name}" for name in _linear_layers(block) if name not in fitting]
        converted += [f"{number}.{name}" for name in fitting]
        settings = replace(plain, pad_inner_dim=number in padded)
        convert_to_float8_training(block, config=settings, module_filter_fn=partial(_is_named, fitting))
        for name in fitting:
            linear: Any = block.get_submodule(name)
            linear.train(block.training)  # as the layer that it replaces
            # The layer holds itself by this: only a collection frees its memory, as it does between phases.
            linear.forward = partial(_forward, linear)
    if not converted:
        raise ValueError(
            f"--fp8 {recipe}: no block of this model has linear layers whose sides are multiples of {_MULTIPLE}: leave "
            "the flag out"
        )
    logger.info("fp8 (%s): %d linear layers of %d blocks.", recipe, len(converted), len(blocks))
    if left:
        logger.warning("fp8: %d layers are left, with sides that are no multiples of %d.", len(left), _MULTIPLE)
    return Conversion(tuple(converted), tuple(left))


def use_fp8(
    blocks: Sequence[nn.Module],
    recipe: str,
    *,
    device: torch.device,
    batch_size: int,
    text_length: int,
    will_be_compiled: bool,
) -> Conversion:
    """What ``--fp8`` means for a model, on a device that can; ``batch_size`` and ``text_length`` as ``padded_blocks``.

    Raises:
        ValueError: the device cannot, torchao is missing, or no layer of the model can be converted.
    """
    check_fp8(recipe, device=device)
    if not will_be_compiled:
        logger.warning(
            "--fp8 %s without compilation: scales and casts run one by one and take longer than fp8 saves. Pass "
            "--torchcompile.",
            recipe,
        )
    padded = padded_blocks(len(blocks), batch_size=batch_size, text_length=text_length)
    if len(padded) > 1:
        logger.warning(
            "fp8: batches of %d captions of %d tokens are small, or %d is no multiple of %d: products are padded, and "
            "slower than they could be.",
            *(batch_size, text_length, batch_size, _MULTIPLE),
        )
    return convert_blocks(blocks, recipe, padded=padded)


def fitting_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a block that fp8 can compute, by name."""
    return {
        name: layer
        for name, layer in _linear_layers(block).items()
        if layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
    }


def _linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    # Not what is derived from nn.Linear: nn.MultiheadAttention uses the weight of its own without calling the layer.
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear}


def _is_named(names: Container[str], _: nn.Module, name: str) -> bool:
    return name in names


def _forward(linear: Any, x: Tensor) -> Tensor:
    if linear.training:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # torchao asks for CUDA's only
        computed: Tensor = type(linear).forward(linear, x)
        return computed
    return F.linear(x, linear.weight, linear.bias)
