"""How large a model is: parameters, and multiply-accumulates of one forward pass, without memory or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.clip import Clip
from models.config import ClipConfig
from models.factory import build_model
from models.timm_tower import TimmTower
from models.transformer import Transformer


class ModelProfile(NamedTuple):
    """Per pair of one image and one text of full context length. FLOPs are 2 x MACs; training costs 3 x forward."""

    image_parameters: int
    text_parameters: int
    parameters: int
    """All of them, with the temperature (and bias)."""
    image_macs: int
    text_macs: int

    @property
    def macs(self) -> int:
        """Both towers."""
        return self.image_macs + self.text_macs


def profile_model(config: ClipConfig) -> ModelProfile:
    """Count on the meta device.

    Attention matrices count in full, also causal ones, and so does the last block, as in OpenCLIP's model profile:
    what a kernel skips, or nobody reads, does not change the figure.

    Raises:
        ValueError: a Hugging Face text tower, whose code looks at the values of its masks.
    """
    model = _without_memory(config)
    image_macs, text_macs = _count_towers(model, text_length=config.text_cfg.context_length)
    parameters = _count_parameters(model)
    image_parameters = _count_parameters(model.visual)
    temperature = sum(scalar.numel() for scalar in (model.logit_scale, model.logit_bias) if scalar is not None)
    return ModelProfile(
        image_parameters=image_parameters,
        text_parameters=parameters - image_parameters - temperature,
        parameters=parameters,
        image_macs=image_macs,
        text_macs=text_macs,
    )


def training_flops(
    config: ClipConfig, *, text_length: int | None = None, trains_image: bool = True, trains_text: bool = True
) -> int:
    """Of the forward and the backward pass of one pair, with patch dropout, which ``profile_model`` leaves out.

    A tower that is not trained has no backward pass. What checkpointing computes twice counts once.

    Args:
        text_length: of the caption; None is the context length.

    Raises:
        ValueError: a Hugging Face text tower.
    """
    model = _without_memory(config)
    if isinstance(model.visual, TimmTower):
        model.visual.set_image_size(config.vision_cfg.image_hw)
    for module in model.modules():
        if type(module).__name__.startswith("PatchDropout"):  # ours, open_clip's, or one of timm's
            module.train()
    image, text = _count_towers(model, text_length=text_length or config.text_cfg.context_length)
    return 2 * ((3 if trains_image else 1) * image + (3 if trains_text else 1) * text)


def _without_memory(config: ClipConfig) -> Clip:
    if config.text_cfg.hf_model_name is not None:
        raise ValueError(f"'{config.text_cfg.hf_model_name}' of model '{config.name}' cannot run without memory")
    model = build_model(_without_downloads(config), device="meta").eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.whole_last_block = True
    return model


def _count_towers(model: Clip, *, text_length: int) -> tuple[int, int]:
    """MACs of the forward passes of one image and one caption."""
    images = torch.empty(1, 3, *model.config.vision_cfg.image_hw, device="meta")
    texts = torch.zeros(1, text_length, dtype=torch.int64, device="meta")
    with torch.no_grad():
        return _count_macs(lambda: model.encode_image(images)), _count_macs(lambda: model.encode_text(texts))


def _without_downloads(config: ClipConfig) -> ClipConfig:
    return replace(config, vision_cfg=replace(config.vision_cfg, timm_model_pretrained=False))


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_macs(forward: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        forward()
    return int(counter.get_total_flops()) // 2
