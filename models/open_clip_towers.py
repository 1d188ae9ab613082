"""Towers that are not written natively, built from open_clip's own modules.

They are ModifiedResNet, attentional pooling, fixed position embeddings, block variants (``qk_norm``, ``scale_*``) and
an appended class embedding in the text tower. Each gets a ``blocks`` list. It is a plain list, which nn.Module does not
register, so the state-dict keys stay OpenCLIP's.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from torch import Tensor, nn

from models.config import TextConfig, VisionConfig


def is_native_vision(config: VisionConfig) -> bool:
    """True if models.vision_transformer covers the configuration."""
    fixed_positions = config.pos_embed_type != "learnable"
    return config.kind == "vit" and not (config.has_custom_blocks or config.attentional_pool or fixed_positions)


def is_native_text(config: TextConfig) -> bool:
    """True if models.text_transformer covers the configuration."""
    return not (config.has_custom_blocks or config.embed_cls)


def build_open_clip_vision(config: VisionConfig, *, embed_dim: int, quick_gelu: bool) -> nn.Module:
    """A ModifiedResNet, or a vision transformer with options that ours lacks."""
    tower: Any = _build_vision_tower(embed_dim, CLIPVisionCfg(**asdict(config)), quick_gelu)
    if config.kind == "resnet":
        stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
        tower.blocks = [block for stage in stages for block in stage]
    else:
        tower.blocks = list(tower.transformer.resblocks)
    return tower  # type: ignore[no-any-return]


def build_open_clip_text(config: TextConfig, *, embed_dim: int, quick_gelu: bool, custom_text: bool) -> nn.Module:
    """A text transformer with options that ours lacks.

    In the classic layout (``custom_text`` false) Clip calls the inner transformer itself, and has no masks.
    """
    tower: Any = _build_text_tower(embed_dim, CLIPTextCfg(**asdict(config)), quick_gelu)
    tower.blocks = list(tower.transformer.resblocks)
    if not custom_text and not config.no_causal_mask:
        tower.transformer.register_forward_pre_hook(_add_causal_mask, with_kwargs=True)
    return tower  # type: ignore[no-any-return]


def _add_causal_mask(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """open_clip's blocks take the mask as a float tensor: 0 where a token may look, -inf in its future."""
    tokens = args[0]  # [B, L, D]
    length = tokens.shape[1]
    mask = torch.full((length, length), float("-inf"), dtype=tokens.dtype, device=tokens.device).triu(1)  # [L, L]
    return args, {**kwargs, "attn_mask": mask}
