from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import models.hf_text_tower
from models.profile import profile_model
from tests.models.tiny import model_cfg, open_clip_model, tiny_config, tiny_model, tiny_texts

ENCODER = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base", "hf_model_pretrained": False}


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.hf_text_tower, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'roberta-base' needs transformers: pip install 'clipyard\[hf\]'"):
        tiny_model(text=ENCODER)


def test_a_hugging_face_tower_cannot_be_profiled() -> None:
    with pytest.raises(ValueError, match="'roberta-base' of model 'tiny' cannot run without memory"):
        profile_model(tiny_config(text=ENCODER))


if find_spec("transformers"):  # the [hf] extra is installed

    @pytest.fixture
    def encoder(tmp_path: Path) -> dict[str, object]:
        from transformers import RobertaConfig

        config = RobertaConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
        )
        config.save_pretrained(tmp_path)
        return {**ENCODER, "hf_model_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}

    def test_a_hugging_face_tower_equals_open_clips(encoder: dict[str, object]) -> None:
        model, reference = tiny_model(text=encoder), open_clip_model(model_cfg(text=encoder, custom_text=True))
        assert list(model.state_dict()) == list(reference.state_dict())
        texts = tiny_texts()
        torch.testing.assert_close(model.encode_text(texts), reference.encode_text(texts), atol=1e-6, rtol=0)
        assert len(model.text_blocks) == 3
