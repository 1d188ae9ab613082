"""What ``--aug-cfg`` asks for: OpenCLIP's keys, with their honest meaning or with their effect in OpenCLIP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import PreprocessConfig
from training.data.color import ColorJitter
from training.data.crop import RandomCrop
from training.data.erasing import RandomErasing

logger = logging.getLogger(__name__)

DEFAULT_SCALE = (0.9, 1.0)
DEFAULT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for every image; probabilities are per image."""

    crop: RandomCrop
    jitter: ColorJitter | None = None
    jitter_probability: float = 1.0
    grey_probability: float = 0.0
    erasing: RandomErasing | None = None
    interpolation: str = "bicubic"
    """``bicubic``, ``bilinear``, or ``random`` between the two."""


def resolve_keys(aug_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that take effect: all of them, unless ``openclip_keys`` asks for OpenCLIP 3.3.0's behaviour.

    Raises:
        ValueError: ``color_jitter_prob`` without a ``color_jitter`` to apply.
    """
    config = dict(aug_cfg)
    use_timm = bool(config.get("use_timm", False))
    if config.pop("openclip_keys", False):
        config = _openclip_meaning(config, use_timm=use_timm)
    probability = config.get("color_jitter_prob")
    if probability and config.get("color_jitter") is None and not use_timm:
        raise ValueError(f"--aug-cfg color_jitter_prob={probability} without color_jitter: pass both.")
    return config


def _openclip_meaning(config: dict[str, Any], *, use_timm: bool) -> dict[str, Any]:
    """What OpenCLIP 3.3.0 does with these keys, as opposed to what they say."""
    ignored = ["color_jitter_prob", "gray_scale_prob"] if use_timm else ["ratio", "re_prob", "re_count"]
    if not use_timm and not config.get("color_jitter_prob"):
        ignored.append("color_jitter")
    for key in ignored:
        if key in config:
            logger.warning("--aug-cfg %s has no effect here: openclip_keys=True asks for OpenCLIP's behaviour.", key)
    return {key: value for key, value in config.items() if key not in ignored}


def build_augmentation(preprocess: PreprocessConfig, config: Mapping[str, Any]) -> Augmentation:
    """What resolved keys ask for. Without ``use_timm`` crops are always resized bicubically, as in OpenCLIP."""
    jitter, probability = config.get("color_jitter"), config.get("color_jitter_prob")
    erase = config.get("re_prob")
    return Augmentation(
        crop=RandomCrop(
            scale=tuple(config.get("scale") or DEFAULT_SCALE), ratio=tuple(config.get("ratio") or DEFAULT_RATIO)
        ),
        jitter=None if jitter is None else ColorJitter.of_strengths(jitter),
        jitter_probability=1.0 if probability is None else probability,
        grey_probability=config.get("gray_scale_prob") or 0.0,
        erasing=RandomErasing(preprocess, probability=erase, max_count=config.get("re_count") or 1) if erase else None,
        interpolation=preprocess.interpolation if config.get("use_timm") else "bicubic",
    )
