"""A Hugging Face encoder as the text tower, through open_clip's adapter; needs the ``[hf]`` extra."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from torch import nn

from models.config import TextConfig


def build_hf_text_tower(config: TextConfig, *, embed_dim: int) -> nn.Module:
    """open_clip's HFTextEncoder, with ``blocks``: the encoder's layers.

    Raises:
        ValueError: the transformers package is missing.
    """
    require_transformers(f"text encoder '{config.hf_model_name}'")
    tower: Any = HFTextEncoder(
        config.hf_model_name,
        output_dim=embed_dim,
        proj_type=config.hf_proj_type,
        pooler_type=config.hf_pooler_type,
        pretrained=config.hf_model_pretrained,
    )
    tower.blocks = hf_blocks(tower)  # a plain list: nn.Module does not register it, so state-dict keys stay OpenCLIP's
    return tower  # type: ignore[no-any-return]


def hf_blocks(tower: Any) -> list[nn.Module]:
    """The layers of the encoder, or an empty list for an architecture that open_clip does not know."""
    encoder = getattr(tower.transformer, "encoder", tower.transformer)
    architecture = arch_dict.get(tower.config.model_type)
    if architecture is None:
        return []
    return list(getattr(encoder, architecture["config_names"]["layer_attr"], []))


def is_hf_text_tower(module: object) -> bool:
    """True for a tower built here."""
    return isinstance(module, HFTextEncoder)


def require_transformers(purpose: str) -> None:
    """Refuse early, and say what to install.

    Raises:
        ValueError: the transformers package is missing.
    """
    if find_spec("transformers") is None:
        raise ValueError(f"{purpose} needs transformers: pip install 'clipyard[hf]', or choose another --model")
