"""Reads model_facts.json: parameters, cost and activation memory of the built-in models, counted beforehand.

A login node need not have torch, so nothing is counted here; benchmarks/model_facts.py writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from training.config import ModelConfig

FACTS_PATH = Path(__file__).with_name("model_facts.json")


class ModelFacts(NamedTuple):
    """Per sample: one image, and one text of full context length. Activations in bf16 autocast, without compilation."""

    parameters: int
    image_parameters: int
    largest_block_parameters: int
    block_parameters: int
    """In the repeated blocks of both towers: what FSDP gathers block by block."""
    image_gmac: float
    text_gmac: float
    image_mb: float
    """Kept for the backward pass by the image tower, in 10^6 bytes."""
    text_mb: float
    image_checkpointed_mb: float
    """The same with --grad-checkpointing."""
    text_checkpointed_mb: float
    image_hw: tuple[int, int]
    context_length: int
    embed_dim: int

    @property
    def gmac(self) -> float:
        """Of one forward pass of both towers."""
        return self.image_gmac + self.text_gmac


class FoundFacts(NamedTuple):
    """What is known of a model, and what had to be assumed for it."""

    facts: ModelFacts | None
    remarks: tuple[str, ...]


def find_facts(model: ModelConfig) -> FoundFacts:
    """The facts of ``--model``, scaled for the ``--force-`` flags; None for a model that is not built in."""
    content = _read(FACTS_PATH)
    row = content["models"].get(model.model)
    if row is None:
        reason = content["unknown"].get(model.model, "it is not a built-in model")
        return FoundFacts(None, (f"size and cost of {model.model} are not known here ({reason})",))
    facts = ModelFacts(**row | {"image_hw": tuple(row["image_hw"])})
    return _scaled(facts, model)


def _scaled(facts: ModelFacts, model: ModelConfig) -> FoundFacts:
    """Cost and memory in proportion to tokens. Attention grows faster, which is a few per cent at these lengths."""
    remarks = []
    image, text = 1.0, 1.0
    if model.force_image_size is not None:
        height, width = model.force_image_size[0], model.force_image_size[-1]
        image *= height * width / (facts.image_hw[0] * facts.image_hw[1])
        facts = facts._replace(image_hw=(height, width))
        remarks.append(f"image tower scaled by {image:.3g}, the ratio of the pixels, for --force-image-size")
    if model.force_patch_dropout:
        image *= 1 - model.force_patch_dropout
        remarks.append(f"image tower scaled by {1 - model.force_patch_dropout:.3g} for --force-patch-dropout")
    if model.force_context_length is not None:
        text = model.force_context_length / facts.context_length
        facts = facts._replace(context_length=model.force_context_length)
        remarks.append(f"text tower scaled by {text:.3g} for --force-context-length")
    scaled = facts._replace(
        image_gmac=facts.image_gmac * image,
        image_mb=facts.image_mb * image,
        image_checkpointed_mb=facts.image_checkpointed_mb * image,
        text_gmac=facts.text_gmac * text,
        text_mb=facts.text_mb * text,
        text_checkpointed_mb=facts.text_checkpointed_mb * text,
    )
    return FoundFacts(scaled, tuple(remarks))


@cache
def _read(path: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(path.read_text())
    return content
