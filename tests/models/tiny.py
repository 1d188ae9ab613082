"""Tiny models of every kind, and open_clip's own module for the same configuration."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import add_model_config, get_model_config
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from models.clip import Clip
from models.config import ClipConfig, parse_model_config
from models.factory import build_model

CONTEXT, VOCABULARY, EMBEDDING = 12, 50, 24
VISION = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 48, "heads": 3, "layers": 3}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
CONVNEXT = {"timm_model_name": "convnext_atto", "image_size": 64}
TIMM_RESNET = {"timm_model_name": "resnet10t", "image_size": 176}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}


def model_cfg(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any
) -> dict[str, Any]:
    """An OpenCLIP-style model_cfg with changes; a timm trunk replaces the ViT keys."""
    vision = vision or {}
    base = {} if "timm_model_name" in vision else VISION
    return {"embed_dim": EMBEDDING, "vision_cfg": {**base, **vision}, "text_cfg": {**TEXT, **(text or {})}, **top}


def tiny_config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any) -> ClipConfig:
    return parse_model_config(model_cfg(vision, text, **top), name="tiny")


def tiny_model(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, *, seed: int = 0, **top: Any
) -> Clip:
    torch.manual_seed(seed)
    return build_model(tiny_config(vision, text, **top)).eval()


def write_model_file(directory: Path, name: str = "tiny", **cfg: Any) -> Path:
    path = directory / f"{name}.json"
    path.write_text(json.dumps(model_cfg(**cfg)))
    return path


# Our own configurations are files that open_clip reads as well.
add_model_config(str(resources.files("configs") / "models"))


def open_clip_model(cfg: dict[str, Any] | str, *, seed: int = 0) -> nn.Module:
    """open_clip's module for a model_cfg or a built-in name, randomly initialised from the seed."""
    cfg = get_model_config(cfg) if isinstance(cfg, str) else copy.deepcopy(cfg)
    cls = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
    torch.manual_seed(seed)
    return cls(**cfg).eval()


def tiny_images(batch: int = 2, *, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def tiny_texts(batch: int = 2, *, length: int = CONTEXT) -> Tensor:
    """Random ids that end with the highest one, as OpenAI's vocabulary has it."""
    texts = torch.randint(1, VOCABULARY - 1, (batch, length), generator=torch.Generator().manual_seed(2))
    texts[:, -1] = VOCABULARY - 1
    return texts
