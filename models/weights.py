"""Foreign checkpoints in, our parameters out: files, layouts, and position embeddings of another size.

    file (.pt .pth .bin .safetensors) -> read_state_dict -> names and tensors as saved -> load_weights -> a Clip

Only tensors are ever unpickled.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from open_clip.convert import convert_state_dict
from safetensors.torch import load_file
from torch import Tensor

from models.clip import Clip

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_CLASSIC_TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_HF_POSITION_IDS = "text.transformer.embeddings.position_ids"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, bare or under ``state_dict``, with or without DDP's ``module.`` prefix.

    Raises:
        ValueError: no such file, another format, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights file '{path}': correct the path given to --pretrained")
    if path.suffix == ".safetensors":
        content: object = load_file(path)
    elif path.suffix in _TORCH_SUFFIXES:
        content = _torch_load(path)
    else:
        known = ", ".join((*_TORCH_SUFFIXES, ".safetensors"))
        raise ValueError(f"'{path}' has the suffix '{path.suffix}', weights are read from {known}: convert the file")
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"'{path}' holds no state dict: expected named tensors, bare or under 'state_dict'")
    if all(key.startswith("module.") for key in content):
        return {key.removeprefix("module."): value for key, value in content.items()}
    return content


def load_weights(model: Clip, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy a state dict into a model after bringing it to the model's layout and sizes.

    Raises:
        ValueError: the state dict belongs to another architecture; with ``strict`` also if a name is missing or extra.
    """
    adapted = adapt_state_dict(model, state)
    expected = model.state_dict()
    missing = [key for key in expected if key not in adapted] if strict else []
    unexpected = [key for key in adapted if key not in expected] if strict else []
    mismatched = [
        f"{key} {tuple(adapted[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in adapted and adapted[key].shape != tensor.shape
    ]
    problems = [
        f"{len(keys)} {kind} (first: {keys[0]})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit model '{model.config.name}': of {len(expected)} tensors {', '.join(problems)}; "
            f"pass the --model that the weights were trained with (and its --force-* flags)"
        )
    model.load_state_dict(adapted, strict=strict)


def adapt_state_dict(model: Clip, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in the layout and with the sizes of the model, where OpenCLIP would do the same."""
    # MobileCLIP's own checkpoints; any other state dict passes through unchanged.
    adapted: dict[str, Tensor] = dict(convert_state_dict(model, dict(state)))
    if model.config.custom_text and "text_projection" in adapted:
        adapted = {f"text.{key}" if key.startswith(_CLASSIC_TEXT_PARTS) else key: adapted[key] for key in adapted}
    for name, parameter in (("logit_scale", model.logit_scale), ("logit_bias", model.logit_bias)):
        if parameter is not None and name in adapted and adapted[name].numel() == 1:
            adapted[name] = adapted[name].reshape(parameter.shape)  # [] <-> [1]
    if model.logit_bias is not None and "logit_bias" not in adapted:
        adapted["logit_bias"] = torch.zeros_like(model.logit_bias)  # a softmax-trained model has no bias
    if _HF_POSITION_IDS in adapted and _HF_POSITION_IDS not in model.state_dict():
        del adapted[_HF_POSITION_IDS]  # a buffer that transformers stopped saving
    _resize_image_positions(adapted, grid_size=getattr(model.visual, "grid_size", None))
    text_key = "text.positional_embedding" if model.config.custom_text else "positional_embedding"
    _resize_text_positions(adapted, text_key, context_length=model.context_length)
    return adapted


def resize_image_positions(positions: Tensor, *, grid_size: tuple[int, int]) -> Tensor:
    """[1 + n*n, D] -> [1 + rows*columns, D], bicubic with antialiasing as OpenCLIP; the class token's is kept."""
    class_position, patch_positions = positions[:1], positions[1:]
    side = round(len(patch_positions) ** 0.5)
    return torch.cat([class_position, resize_grid(patch_positions, old=(side, side), new=grid_size)])


def resize_grid(values: Tensor, *, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """[n, D] of n = rows * columns places -> [m, D], antialiased.

    Args:
        mode: ``bicubic`` as OpenCLIP and timm; ``bilinear`` weighs with nothing negative.
    """
    grid = values.float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # [n, D] -> [1, D, rows, columns]
    resized = F.interpolate(grid, size=new, mode=mode, antialias=True, align_corners=False)
    return resized[0].flatten(1).T.to(values.dtype)  # [1, D, rows, columns] -> [m, D]


def resize_text_positions(positions: Tensor, *, context_length: int) -> Tensor:
    """[L, D] -> [context_length, D], linear as OpenCLIP."""
    resized = F.interpolate(positions.float().T[None], size=context_length, mode="linear", align_corners=False)
    return resized[0].T.to(positions.dtype)


def _resize_image_positions(state: dict[str, Tensor], *, grid_size: tuple[int, int] | None) -> None:
    positions = state.get("visual.positional_embedding")
    if positions is None or grid_size is None or positions.ndim != 2:
        return
    patches = len(positions) - 1
    is_square = round(patches**0.5) ** 2 == patches  # otherwise the shape check of load_weights speaks
    if is_square and patches != grid_size[0] * grid_size[1]:
        state["visual.positional_embedding"] = resize_image_positions(positions, grid_size=grid_size)


def _resize_text_positions(state: dict[str, Tensor], key: str, *, context_length: int) -> None:
    positions = state.get(key)
    if positions is not None and positions.ndim == 2 and len(positions) != context_length:
        state[key] = resize_text_positions(positions, context_length=context_length)


def _torch_load(path: Path) -> object:
    try:
        # Mapped where the format allows it: a training checkpoint is three quarters optimizer state.
        return cast(object, torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"cannot read '{path}' as a file of tensors ({str(error).splitlines()[0]}): "
            f"pickled code and TorchScript archives are never loaded; save its state dict, or as .safetensors"
        ) from error
