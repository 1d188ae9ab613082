"""Writes weights as files that OpenCLIP and others load: ``.pt``, ``.safetensors``, or a directory as on the hub.

OUT/open_clip_model.safetensors
OUT/open_clip_config.json          {"model_cfg": ..., "preprocess_cfg": ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import PreprocessConfig, parse_model_config, to_open_clip_json
from models.config_files import OPEN_CLIP_CONFIG, find_model
from models.factory import override_config
from training.checkpoint.checkpointer import new_token
from training.checkpoint.tensor_file import write_tensors

HUB_WEIGHTS = "open_clip_model.safetensors"
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


def write_weights(out: Path, weights: Mapping[str, Tensor], train: Mapping[str, Any], *, name: str) -> None:
    """Writes a file or, where the name has no suffix, a directory; what is there stays until all is written.

    Args:
        train: ``train.json`` of the checkpoint: how far it was trained, and with which settings.

    Raises:
        ValueError: another suffix, or a model that is not to be found here.
    """
    if out.suffix == "":
        model_files = hub_config(train)
        out.mkdir(parents=True, exist_ok=True)
        _write_safetensors(out / HUB_WEIGHTS, weights)
        (out / OPEN_CLIP_CONFIG).write_text(json.dumps(model_files, indent=2) + "\n")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        _write_safetensors(out, weights)
    elif out.suffix == ".pt":
        facts = {"epoch": int(train["epoch"]), "name": name, "global_step": int(train["step"])}
        write_torch(out, {**facts, "samples_seen": int(train["samples_seen"]), "state_dict": dict(weights)})
    else:
        raise ValueError(f"{str(out)!r} ends in {out.suffix!r}: write to NAME.pt, NAME.safetensors or a directory.")


def write_torch(out: Path, content: Mapping[str, Any]) -> None:
    """Replaces a ``.pt`` file at once."""
    staging = out.with_name(f".tmp-{new_token()}.pt")
    try:
        torch.save(dict(content), staging)
        staging.replace(out)
    finally:
        staging.unlink(missing_ok=True)


def hub_config(train: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``open_clip_config.json`` for the model that a checkpoint's settings name.

    Raises:
        ValueError: there is no such model here.
    """
    settings = train["config"]
    try:
        source = find_model(settings["model"])
    except ValueError as error:
        raise ValueError(
            f"{error} (the checkpoint says --model {settings['model']}). Export to .pt or .safetensors, which need no "
            "model configuration, or put the file back."
        ) from error
    siglip = bool(settings.get("siglip"))
    config = override_config(
        parse_model_config(source.model_cfg, name=settings["model"]),
        quick_gelu=bool(settings.get("force_quick_gelu")),
        custom_text=bool(settings.get("force_custom_text")),
        image_size=train.get("phase", {}).get("image_size") or settings.get("force_image_size"),
        context_length=settings.get("force_context_length"),
        # A loss with a bias: its values come from the weights, that there is one from here.
        init_logit_bias=-10.0 if siglip else None,
    )
    flags = {key: settings.get(f"image_{key}") for key in _PREPROCESS_KEYS}
    preprocess = asdict(PreprocessConfig(size=(1, 1)))  # every key has a default, and the size is the model's
    for layer in (source.preprocess_cfg, flags):
        preprocess |= {key: layer[key] for key in _PREPROCESS_KEYS if layer.get(key) is not None}
    return {
        "model_cfg": to_open_clip_json(config),
        "preprocess_cfg": {key: preprocess[key] for key in _PREPROCESS_KEYS},
    }


def _write_safetensors(out: Path, weights: Mapping[str, Tensor]) -> None:
    staging = out.with_name(f".tmp-{new_token()}")
    try:
        write_tensors(staging, weights)
        staging.replace(out)
    finally:
        staging.unlink(missing_ok=True)
