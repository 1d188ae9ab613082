"""A model name and the flags that change it, to a module with its configuration and preprocessing.

    name -> JSON -> ClipConfig -> overrides -> towers -> Clip -> weights -> another image size (timm) -> device
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.clip import Clip
from models.config import (
    ClipConfig,
    PreprocessConfig,
    TextConfig,
    VisionConfig,
    as_pair,
    check_config,
    parse_model_config,
)
from models.config_files import find_model
from models.hf_text_tower import build_hf_text_tower
from models.open_clip_towers import build_open_clip_text, build_open_clip_vision, is_native_text, is_native_vision
from models.pretrained import Pretrained, find_pretrained
from models.text_transformer import TextTransformer
from models.timm_tower import TimmTower
from models.vision_transformer import VisionTransformer
from models.weights import load_weights, read_state_dict

logger = logging.getLogger(__name__)

_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class BuiltModel(NamedTuple):
    """A model, the configuration it was built from (overrides included), and how its images are prepared."""

    model: Clip
    config: ClipConfig
    preprocess: PreprocessConfig


def create_model(
    name: str,
    *,
    pretrained: str = "",
    pretrained_image: bool = False,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
    reads_weights: bool = True,
    force_quick_gelu: bool = False,
    force_custom_text: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
) -> BuiltModel:
    """Build a model by name, with OpenCLIP's meaning of every option.

    Args:
        pretrained: a tag, a file, or "" for a random initialisation from torch's current seed.
        pretrained_image: start the timm trunk from timm's weights; without effect if CLIP weights are loaded.
        device: weights are drawn on the CPU and then moved, so a seed means the same weights on every device;
            ``meta`` builds without memory.
        reads_weights: False for a model that gets its weights from elsewhere: the published ones are looked for, since
            their publisher says how images are prepared, but not read.
    """
    source = find_model(name, cache_dir=cache_dir)
    config = override_config(
        parse_model_config(source.model_cfg, name=name),
        quick_gelu=force_quick_gelu,
        custom_text=force_custom_text,
        patch_dropout=force_patch_dropout,
        image_size=force_image_size,
        context_length=force_context_length,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )
    weights = find_pretrained(name, pretrained, cache_dir=cache_dir)
    is_meta = torch.device(device).type == "meta"
    _check_weights(config, weights, pretrained_image=pretrained_image, has_memory=not is_meta or not reads_weights)
    from_parts = weights is None and not is_meta and reads_weights
    config = _with_tower_weights(config, image=pretrained_image and from_parts, text=from_parts)
    model = build_model(config, device="meta" if is_meta else "cpu")
    state = read_state_dict(weights.path) if weights is not None and reads_weights else None
    _load(model, state, forced_size=None if force_image_size is None else config.vision_cfg.image_hw)
    forced = {
        "mean": image_mean,
        "std": image_std,
        "interpolation": image_interpolation,
        "resize_mode": image_resize_mode,
    }
    published = weights.preprocess if weights is not None else {}
    preprocess = _merge_preprocess(config, source.preprocess_cfg, published, forced)
    return BuiltModel(model.to(device), config, preprocess)


def build_model(config: ClipConfig, *, device: str | torch.device = "cpu") -> Clip:
    """A randomly initialised model from a configuration, on any device including ``meta``."""
    is_meta = torch.device(device).type == "meta"
    with torch.device("meta") if is_meta else nullcontext():
        # The image tower first: this is the order in which OpenCLIP draws random numbers.
        visual = _build_image_tower(config, config.vision_cfg)
        text = _build_text_tower(config, config.text_cfg)
        model = Clip(config, visual=visual, text=text)
    return model.to(device)


def override_config(
    config: ClipConfig,
    *,
    quick_gelu: bool = False,
    custom_text: bool = False,
    patch_dropout: float | None = None,
    image_size: int | Sequence[int] | None = None,
    context_length: int | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
) -> ClipConfig:
    """The configuration with the ``--force-*`` flags applied, checked again. None and False leave a value alone."""
    size: int | tuple[int, int] | None = None
    if image_size is not None:
        height, width = as_pair(image_size if isinstance(image_size, int) else tuple(image_size))
        size = height if height == width else (height, width)
    vision = _replaced(config.vision_cfg, patch_dropout=patch_dropout, image_size=size)
    text = _replaced(config.text_cfg, context_length=context_length)
    config = replace(config, vision_cfg=vision, text_cfg=text)
    config = _replaced(
        config,
        quick_gelu=quick_gelu or None,
        custom_text=custom_text or None,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )
    check_config(config)
    return config


def _replaced(config: Any, **changes: Any) -> Any:
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def _build_image_tower(config: ClipConfig, vision: VisionConfig) -> nn.Module:
    if vision.kind == "timm":
        return TimmTower(vision, embed_dim=config.embed_dim)  # timm's activations are its own, whatever quick_gelu says
    if is_native_vision(vision):
        return VisionTransformer(vision, embed_dim=config.embed_dim, quick_gelu=config.quick_gelu)
    return build_open_clip_vision(vision, embed_dim=config.embed_dim, quick_gelu=config.quick_gelu)


def _build_text_tower(config: ClipConfig, text: TextConfig) -> nn.Module:
    if text.hf_model_name is not None:
        return build_hf_text_tower(text, embed_dim=config.embed_dim)
    if is_native_text(text):
        return TextTransformer(text, embed_dim=config.embed_dim, quick_gelu=config.quick_gelu)
    return build_open_clip_text(
        text, embed_dim=config.embed_dim, quick_gelu=config.quick_gelu, custom_text=config.custom_text
    )


def _check_weights(
    config: ClipConfig, weights: Pretrained | None, *, pretrained_image: bool, has_memory: bool
) -> None:
    if weights is not None and not has_memory:
        raise ValueError(f"device 'meta' has no memory for the weights of '{config.name}': drop --pretrained")
    if pretrained_image and config.vision_cfg.kind != "timm":
        raise ValueError(
            f"--pretrained-image loads timm's weights, and the image tower of '{config.name}' is not a timm model: "
            f"drop the flag, or pass --pretrained"
        )
    if pretrained_image and weights is not None:
        logger.warning("--pretrained-image has no effect: all weights come from %s", weights.path)
    if weights is not None and weights.quick_gelu not in (None, config.quick_gelu):
        logger.warning(
            "the weights were trained with quick_gelu=%s, model '%s' has quick_gelu=%s: see --force-quick-gelu",
            weights.quick_gelu,
            config.name,
            config.quick_gelu,
        )


def _with_tower_weights(config: ClipConfig, *, image: bool, text: bool) -> ClipConfig:
    """Whether timm and Hugging Face towers start from their own published weights, whatever the JSON says."""
    vision = replace(config.vision_cfg, timm_model_pretrained=image) if config.vision_cfg.kind == "timm" else None
    text_cfg = replace(config.text_cfg, hf_model_pretrained=text) if config.text_cfg.hf_model_name else None
    return replace(config, vision_cfg=vision or config.vision_cfg, text_cfg=text_cfg or config.text_cfg)


def _load(model: Clip, state: Mapping[str, Tensor] | None, *, forced_size: tuple[int, int] | None) -> None:
    """Load weights, and resize a timm trunk after that, unless the weights already have the forced size."""
    resizable = model.visual if forced_size is not None and isinstance(model.visual, TimmTower) else None
    if state is not None:
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith("visual.trunk.")}
        already_resized = any(key in state and state[key].shape != shape for key, shape in shapes.items())
        if resizable is not None and forced_size is not None and already_resized:
            resizable.set_image_size(forced_size)
        load_weights(model, state)
    if resizable is not None and forced_size is not None:
        resizable.set_image_size(forced_size)
    if isinstance(model.visual, TimmTower):
        model.visual.check_image_size()


def _merge_preprocess(config: ClipConfig, *layers: Mapping[str, Any]) -> PreprocessConfig:
    """Later layers win: the model's file, the publisher of the weights, the flags. The size is always the model's."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update({key: layer[key] for key in _PREPROCESS_KEYS if layer.get(key) is not None})
    for key in ("mean", "std"):
        if key in merged:
            values = tuple(float(value) for value in merged[key])
            merged[key] = values * 3 if len(values) == 1 else values
    return PreprocessConfig(size=config.vision_cfg.image_hw, **merged)
