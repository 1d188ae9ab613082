"""Where the weights of a model come from: a tag of open_clip's registry, a file, a directory or the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)

from models.config_files import HF_HUB, LOCAL_DIR

# The order in which OpenCLIP looks for weights in a model directory.
_DIRECTORY_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass(frozen=True)
class Pretrained:
    """A weights file on this machine, and what its publisher says about its training."""

    path: Path
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    quick_gelu: bool | None = None


def find_pretrained(model_name: str, pretrained: str, *, cache_dir: str | None = None) -> Pretrained | None:
    """Resolve ``--pretrained`` for a model; None if there is nothing to load. Tags are downloaded.

    Raises:
        ValueError: neither a file nor a tag of this model; the message lists the tags.
        RuntimeError: the download failed.
    """
    from_elsewhere = model_name.startswith((LOCAL_DIR, HF_HUB))
    if not pretrained:
        return _from_own_source(model_name, cache_dir=cache_dir) if from_elsewhere else None
    registry_name = Path(model_name).stem if model_name.endswith(".json") else model_name.replace("/", "-")
    tag = {} if from_elsewhere else get_pretrained_cfg(registry_name, pretrained)
    if tag:
        what = f"tag '{pretrained}' of {registry_name}"
        path = _download(what, lambda: download_pretrained(tag, cache_dir=cache_dir))
        return Pretrained(path, preprocess=tag, quick_gelu=bool(tag.get("quick_gelu", False)))
    if Path(pretrained).is_file():
        return Pretrained(Path(pretrained))
    tags = [] if from_elsewhere else list_pretrained_tags_by_model(registry_name)
    available = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
    raise ValueError(f"--pretrained '{pretrained}' is neither a file nor a tag of model '{model_name}': {available}")


def _from_own_source(model_name: str, *, cache_dir: str | None) -> Pretrained | None:
    """The weights beside the configuration of a ``local-dir:`` or ``hf-hub:`` model."""
    if model_name.startswith(HF_HUB):
        repository = model_name.removeprefix(HF_HUB)
        what = f"the weights of {model_name}"
        return Pretrained(_download(what, lambda: download_pretrained_from_hf(repository, cache_dir=cache_dir)))
    directory = Path(model_name.removeprefix(LOCAL_DIR))
    present = [directory / name for name in _DIRECTORY_FILES if (directory / name).is_file()]
    return Pretrained(present[0]) if present else None


def _download(what: str, fetch: Callable[[], str]) -> Path:
    try:
        return Path(fetch())
    except Exception as error:  # the hub, urllib and the file system each have their own family of errors
        raise RuntimeError(
            f"could not download {what} ({error}): on a machine without a network, download it elsewhere "
            f"into --cache-dir, or pass the file to --pretrained"
        ) from error
