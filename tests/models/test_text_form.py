"""Which towers lose their padding, and what the others get."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from models.config import load_model_config
from models.packing import PackedTexts
from models.text_form import TextForm, build_packer, choose_text_form
from tests.models.test_packing import captions
from tests.models.tiny import CONTEXT, tiny_config, tiny_model

PACKED, TRIMMED, PADDED = TextForm.PACKED, TextForm.TRIMMED, TextForm.PADDED
CASES: list[tuple[dict[str, Any], bool, TextForm, str]] = [
    ({}, False, PACKED, "packed, each computed up to its end token"),
    ({"pool_type": "eos"}, True, PACKED, "packed"),
    ({"no_causal_mask": True}, False, PADDED, "padded to 12 tokens: attention without a causal mask sees the padding"),
    ({"pool_type": "last"}, False, PADDED, "pool_type 'last' does not pool an end token"),
    ({"pool_type": "first"}, False, PADDED, "pool_type 'first' does not pool an end token"),
    ({"embed_cls": True}, True, PADDED, "the class embedding stands behind the padding"),
    ({"qk_norm": True}, False, TRIMMED, "padded to the longest of each batch; not packed, because the blocks are"),
    ({"qk_norm": True}, True, PADDED, "open_clip's text tower has a mask of one length"),
]


@pytest.mark.parametrize(("text", "custom_text", "form", "line"), CASES)
def test_each_tower_gets_its_shortest_exact_form(
    text: dict[str, Any], custom_text: bool, form: TextForm, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny_config(text=text, custom_text=custom_text)
    model, texts = tiny_model(text=text, custom_text=custom_text).double(), captions([3, 7])
    given = build_packer(config, text_packing="auto")(texts)
    assert choose_text_form(config)[0] is form
    assert line in caplog.text
    assert isinstance(given, PackedTexts) is (form is PACKED)
    assert form is PACKED or given.shape == (2, 8 if form is TRIMMED else CONTEXT)
    torch.testing.assert_close(model.encode_text(given), model.encode_text(texts), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "convnext_base_w", "convnext_xxlarge", "RN50"])
def test_the_classic_models_are_packed(name: str) -> None:
    assert choose_text_form(load_model_config(name)) == (PACKED, "")


def test_hugging_face_towers_keep_their_padding() -> None:
    form, reason = choose_text_form(load_model_config("roberta-ViT-B-32"))
    assert form is PADDED
    assert "'roberta-base' is Hugging Face's" in reason


def test_packing_can_be_turned_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    texts = captions([3, 7])
    given = build_packer(tiny_config(), text_packing="off")(texts)
    assert torch.equal(given, texts)
    assert given.data_ptr() != texts.data_ptr()
    assert "--text-packing off" in caplog.text


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}])
def test_a_tower_that_needs_the_padding_refuses_packed_texts(text: dict[str, Any]) -> None:
    packed = build_packer(tiny_config(), text_packing="auto")(captions([3, 7]))
    with pytest.raises(ValueError, match="the texts are packed, and model 'tiny' cannot take that: .*; pad them"):
        tiny_model(text=text).encode_text(packed)
