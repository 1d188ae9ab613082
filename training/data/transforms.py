"""Chooses image transforms: to uint8 [3, H, W] at the model's size. Normalisation happens later, on the device.

Augmentation keys mean what OpenCLIP's documentation of them says, with and without ``use_timm``; where its code does
less (it drops some keys without a word), ``openclip_keys=True`` asks for exactly that. docs/data.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import PreprocessConfig
from training.data.augmentation import build_augmentation, resolve_keys
from training.data.device_transform import DeviceTransform
from training.data.encoded_image import file_room
from training.data.fast_transform import FastTransform
from training.data.image_file import ImageTransform

# reference_transforms is imported where it is used: a worker of the fast path does not pay for torchvision and timm.


def build_eval_transform(preprocess: PreprocessConfig) -> ImageTransform:
    """Resize and crop as the model was meant to see images (``resize_mode``: shortest, longest or squash)."""
    from training.data.reference_transforms import build_eval_transform as build

    return build(preprocess)


def build_train_transform(
    preprocess: PreprocessConfig, aug_cfg: Mapping[str, Any], *, decode: str = "fast"
) -> FastTransform | ImageTransform:
    """Random crop and resize, then what ``aug_cfg`` asks for, with OpenCLIP's keys.

    Args:
        decode: ``fast`` takes encoded bytes and draws from OpenCLIP's distributions; ``reference`` takes PIL images
            and has OpenCLIP's exact pixels for the same state of Python's and torch's generators; ``gpu`` draws as
            ``fast`` does and leaves most JPEGs to the device.

    Raises:
        ValueError: ``color_jitter_prob`` without a ``color_jitter`` to apply.
    """
    config = resolve_keys(aug_cfg)
    if decode == "fast":
        return FastTransform(preprocess.size, build_augmentation(preprocess, config))
    if decode == "gpu":
        room = file_room(preprocess.size)
        return DeviceTransform(preprocess.size, build_augmentation(preprocess, config), room=room)
    from training.data.reference_transforms import build_reference_transform

    return build_reference_transform(preprocess, config, use_timm=bool(config.get("use_timm")))
