from __future__ import annotations

import pickle
import random
import subprocess
import sys
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

import models.hf_text_tower
import models.tokenizer
from models.config import load_model_config, parse_model_config
from models.tokenizer import build_tokenizer
from tests.models.tiny import model_cfg, tiny_config

CAPTIONS = ["a photo of a cat", "", "Ünïcode &amp; <tags>, 42 things!", "word " * 100]


def test_ids_are_those_of_open_clip() -> None:
    ids = build_tokenizer(load_model_config("ViT-B-32"))(CAPTIONS)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))


def test_ids_have_the_context_length_and_keep_the_end() -> None:
    tokenizer = build_tokenizer(tiny_config(text={"vocab_size": 49408}))
    ids = tokenizer(CAPTIONS)
    assert ids.shape == (4, tokenizer.context_length) == (4, 12)
    assert ids[3, -1] == 49407


def test_cleaning_options_of_the_model_apply() -> None:
    tokenizer = build_tokenizer(tiny_config(text={"tokenizer_kwargs": {"clean": "canonicalize"}}))
    assert torch.equal(tokenizer(["A cat, sitting!"]), tokenizer(["a cat sitting"]))


def test_one_text_is_a_batch_of_one() -> None:
    tokenizer = build_tokenizer(tiny_config())
    assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))


def test_a_pickle_holds_the_configuration_only() -> None:
    tokenizer = build_tokenizer(tiny_config())
    data = pickle.dumps(tokenizer)
    assert len(data) < 5_000
    assert torch.equal(pickle.loads(data)(CAPTIONS), tokenizer(CAPTIONS))


def test_the_word_cache_of_open_clips_tokenizer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.tokenizer, "_MAX_CACHED_WORDS", 20)
    options = {"tokenizer_kwargs": {"reduction_mask": "simple"}}
    tokenizer = build_tokenizer(tiny_config(text=options))
    words = [f"x{chr(97 + index)}q{chr(97 + index // 2)}" for index in range(26)]
    expected = [tokenizer([word]) for word in words]
    assert len(tokenizer._encode.cache) <= 21
    assert all(torch.equal(tokenizer([word]), ids) for word, ids in zip(words, expected, strict=True))
    assert torch.equal(tokenizer(["<end_of_text>"])[0, 1:3], torch.tensor([49407, 49407]))


@pytest.mark.parametrize("options", [{"reduction_mask": "simple"}, {"additional_special_tokens": ["<mask>"]}])
def test_options_beyond_cleaning_get_open_clips_tokenizer(options: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(tiny_config(text={"tokenizer_kwargs": options}))
    random.seed(0)
    ids = tokenizer(["one <mask> two", "word " * 40])
    random.seed(0)
    assert torch.equal(ids, SimpleTokenizer(context_length=12, **options)(["one <mask> two", "word " * 40]))


def test_clips_tokenizer_does_without_open_clips_imports() -> None:
    program = (
        "import sys; from models.config import load_model_config; from models.tokenizer import build_tokenizer;"
        "build_tokenizer(load_model_config('ViT-B-32'))(['a cat']);"
        "heavy = {'open_clip', 'timm', 'torchvision', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_without_transformers_the_error_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.hf_text_tower, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"of model '{name}' needs transformers: pip install 'clipyard\[hf\]'"):
        build_tokenizer(load_model_config(name))


def test_siglip_names_without_a_named_tokenizer_get_siglips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.hf_text_tower, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="the SigLIP tokenizer of model 'my-siglip'"):
        build_tokenizer(parse_model_config(model_cfg(), name="my-siglip"))
