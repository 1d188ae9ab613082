"""Finding the JSON file behind a model name, without reading a meaning into it. No torch here.

A name is looked for in this order:

    path/to/model.json    a file
    local-dir:PATH        PATH/open_clip_config.json   {"model_cfg": {...}, "preprocess_cfg": {...}}
    hf-hub:ORG/REPO       the same file on the Hugging Face hub
    NAME                  configs/models/NAME.json, then the model_configs of the installed open_clip
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HF_HUB = "hf-hub:"
LOCAL_DIR = "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"

# Sections of families that are not contrastive image-text models, and why a model with one is refused.
REFUSED_SECTIONS = {
    "multimodal_cfg": "CoCa's captioning decoder and its loss are not implemented",
    "audio_cfg": "audio models (CLAP) are not implemented",
    "audio_naflex_cfg": "audio models (CLAP) are not implemented",
    "genlip_cfg": "generative models (GenLIP) are not implemented",
    "genlap_cfg": "generative models (GenLAP) are not implemented",
}


class ModelSource(NamedTuple):
    """The raw JSON sections of a named model."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


def list_models() -> list[str]:
    """Every model name that can be built, ours and open_clip's, sorted."""
    paths = {path.stem: path for directory in _config_directories() for path in directory.glob("*.json")}
    return sorted(name for name, path in paths.items() if not REFUSED_SECTIONS.keys() & _read_json(path).keys())


def find_model(name_or_path: str, *, cache_dir: str | None = None) -> ModelSource:
    """Read the JSON of a model without interpreting it.

    Raises:
        ValueError: no such model; the message has the nearest names.
    """
    if name_or_path.startswith(LOCAL_DIR):
        return _read_directory(Path(name_or_path.removeprefix(LOCAL_DIR)))
    if name_or_path.startswith(HF_HUB):
        return _unwrap(_download_hub_config(name_or_path.removeprefix(HF_HUB), cache_dir=cache_dir))
    path = _config_path(name_or_path)
    if path is None:
        nearest = nearest_names(name_or_path.replace("/", "-"), list_models())
        raise ValueError(f"unknown model '{name_or_path}'{nearest}: pass --model NAME or a path to a .json file")
    return _unwrap(path)


def nearest_names(word: str, words: Collection[str]) -> str:
    """A question to put into an error, " (did you mean A or B?)", or nothing if no word is close."""
    lowered = {candidate.lower(): candidate for candidate in words}
    matches = [lowered[match] for match in difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)]
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _config_directories() -> list[Path]:
    """Ours last, so that it wins in a dictionary."""
    directories = [Path(str(resources.files("configs"))) / "models"]
    spec = find_spec("open_clip")  # found, not imported: importing it costs seconds and needs torch
    if spec is not None and spec.origin is not None:
        directories.insert(0, Path(spec.origin).parent / "model_configs")
    return directories


def _config_path(name_or_path: str) -> Path | None:
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        return path if path.is_file() else None
    for directory in reversed(_config_directories()):
        path = directory / f"{name_or_path.replace('/', '-')}.json"
        if path.is_file():
            return path
    return None


def _read_directory(directory: Path) -> ModelSource:
    path = directory / OPEN_CLIP_CONFIG
    if not path.is_file():
        raise ValueError(f"no {OPEN_CLIP_CONFIG} in '{directory}': --model {LOCAL_DIR}PATH needs that file in PATH")
    return _unwrap(path)


def _download_hub_config(repository: str, *, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # only hub addresses need it

    return Path(hf_hub_download(repository, OPEN_CLIP_CONFIG, cache_dir=cache_dir))


def _unwrap(path: Path) -> ModelSource:
    content = _read_json(path)
    return ModelSource(content.get("model_cfg", content), content.get("preprocess_cfg", {}))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}): --model needs an OpenCLIP-style model file") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a JSON {type(content).__name__}: --model needs an object with embed_dim")
    return content
