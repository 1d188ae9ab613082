"""OpenCLIP's own modules, built without memory: what our counts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

import configs


def build_open_clip(model_name: str) -> Any:
    """A built-in model or one of ours, on ``meta``, that trains: an ``nn.Module``, whose parts have no types."""
    open_clip.add_model_config(Path(configs.__file__).parent / "models")
    with torch.device("meta"):
        model = open_clip.create_model(model_name, device="meta")
    return model.train()


def borrow_weights(model: Any, source: nn.Module) -> None:
    """Gives a model from ``meta`` the weights of another, the same memory; gradients stay each one's own."""
    model.load_state_dict(source.state_dict(), assign=True)
    # The one tensor that is not in its state dict.
    model.attn_mask = torch.full((model.context_length, model.context_length), float("-inf")).triu_(1)


def open_clip_inputs(model: Any, batch_size: int, *, device: str) -> tuple[Tensor, Tensor]:
    """Images and full-length texts without values: float [B, 3, H, W] and int64 [B, L]."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images = torch.empty(batch_size, 3, height, width, device=device)
    return images, torch.zeros(batch_size, model.context_length, dtype=torch.int64, device=device)
