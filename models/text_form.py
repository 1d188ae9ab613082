"""Chooses the form in which captions reach a text tower: the shortest that leaves its features as they are.

packed    no padding at all: causal attention, and an end token that is pooled
trimmed   padded to the longest caption of the batch: the same towers, where their blocks are open_clip's
padded    to the context length: everything whose features depend on the padding, or may
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from torch import Tensor

from models.config import ClipConfig
from models.open_clip_towers import is_native_text
from models.packing import PackedTexts, pack_texts

logger = logging.getLogger(__name__)

PackTexts = Callable[[Tensor], Tensor | PackedTexts]
"""int64 [B, L] on the host -> what the text tower is given, still on the host; new memory."""

_TRIM_TO = 8
"""Trimmed lengths are multiples of this: compiled blocks see few of them."""


class TextForm(Enum):
    """How a batch of captions is laid out."""

    PACKED = "packed"
    TRIMMED = "trimmed"
    PADDED = "padded"


def choose_text_form(config: ClipConfig) -> tuple[TextForm, str]:
    """The shortest exact form for a model, and why it is not a shorter one; empty for the shortest."""
    text = config.text_cfg
    if text.hf_model_name is not None:
        return TextForm.PADDED, f"text encoder '{text.hf_model_name}' is Hugging Face's, and sees the padding as a mask"
    if text.no_causal_mask:
        return TextForm.PADDED, "attention without a causal mask sees the padding"
    if text.pool_type not in ("argmax", "eos"):
        return TextForm.PADDED, f"pool_type '{text.pool_type}' does not pool an end token"
    if text.embed_cls:
        return TextForm.PADDED, "the class embedding stands behind the padding"
    if is_native_text(text):
        return TextForm.PACKED, ""
    if config.custom_text:
        return TextForm.PADDED, "open_clip's text tower has a mask of one length"
    return TextForm.TRIMMED, "the blocks are open_clip's"


def check_packable(config: ClipConfig) -> None:
    """Refuse packed texts where they would give other features.

    Raises:
        ValueError: the model's texts cannot be packed.
    """
    form, reason = choose_text_form(config)
    if form is not TextForm.PACKED:
        raise ValueError(f"the texts are packed, and model '{config.name}' cannot take that: {reason}; pad them")


def cut_texts(config: ClipConfig, text_length: int | None) -> ClipConfig:
    """What a tokenizer and a packer are built from whose captions are cut; the model stays as it is.

    Raises:
        ValueError: longer than the context, or a model whose features depend on the padding.
    """
    if text_length is None:
        return config
    context_length = config.text_cfg.context_length
    if text_length > context_length:
        raise ValueError(
            f"text_length {text_length} is more than the context of {context_length} tokens of model '{config.name}': "
            "lower it, or pass --force-context-length"
        )
    form, reason = choose_text_form(config)
    if form is TextForm.PADDED and text_length < context_length:
        raise ValueError(
            f"text_length {text_length} cannot be had from model '{config.name}': {reason}, so captions cut and padded "
            "to fewer tokens are other inputs than in the model's own length; leave text_length out"
        )
    return replace(config, text_cfg=replace(config.text_cfg, context_length=text_length))


def build_packer(config: ClipConfig, *, text_packing: str) -> PackTexts:
    """What ``--text-packing`` means for a model; says so in the log.

    Args:
        text_packing: ``auto`` or ``off``.
    """
    if text_packing == "off":
        logger.info("Texts: padded to %d tokens, because of --text-packing off.", config.text_cfg.context_length)
        return Tensor.clone
    form, reason = choose_text_form(config)
    if form is TextForm.PADDED:
        logger.info("Texts: padded to %d tokens: %s.", config.text_cfg.context_length, reason)
        return Tensor.clone
    eos_id = config.text_cfg.eos_id if config.text_cfg.pool_type == "eos" else None
    if form is TextForm.TRIMMED:
        logger.info("Texts: padded to the longest of each batch; not packed, because %s.", reason)
        return lambda texts: trim_texts(texts, eos_id=eos_id)
    logger.info("Texts: packed, each computed up to its end token.")
    return lambda texts: pack_texts(texts, eos_id=eos_id)


def trim_texts(texts: Tensor, *, eos_id: int | None) -> Tensor:
    """int64 [B, L] on the host -> [B, the longest caption, rounded up], new memory."""
    ends = (texts if eos_id is None else (texts == eos_id).int()).argmax(dim=1)
    longest = int(ends.max()) + 1
    return texts[:, : -(-longest // _TRIM_TO) * _TRIM_TO].clone()
