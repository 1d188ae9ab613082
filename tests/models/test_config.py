from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from open_clip.factory import get_model_config

from models.config import (
    PreprocessConfig,
    as_pair,
    list_models,
    load_model_config,
    parse_model_config,
    to_open_clip_json,
)
from tests.models.tiny import VISION, model_cfg, write_model_file


def test_built_in_names_come_from_the_installed_open_clip() -> None:
    config = load_model_config("ViT-B-32-quickgelu")
    assert (config.embed_dim, config.quick_gelu, config.vision_cfg.patch_size) == (512, True, 32)
    assert config.text_cfg.vocab_size == 49408


def test_a_slash_in_a_name_means_a_dash() -> None:
    assert load_model_config("ViT-B/32").vision_cfg == load_model_config("ViT-B-32").vision_cfg


def test_models_are_listed_without_the_families_that_are_refused() -> None:
    names = list_models()
    assert {"ViT-B-32", "convnext_xxlarge", "RN50", "ViT-B-16-SigLIP"} <= set(names)
    assert not [name for name in names if name.startswith("coca")]
    assert names == sorted(names)


def test_a_model_is_read_from_a_json_file(tmp_path: Path) -> None:
    config = load_model_config(str(write_model_file(tmp_path)))
    assert config.vision_cfg.layers == VISION["layers"]


def test_a_model_is_read_from_a_local_directory(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg(), "preprocess_cfg": {}}))
    assert load_model_config(f"local-dir:{tmp_path}").embed_dim == 24


def test_a_local_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no open_clip_config\.json in .*local-dir:PATH"):
        load_model_config(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(("name", "nearest"), [("ViT-B32", "ViT-B-32"), ("vit-l-14", "ViT-L-14"), ("RN5", "RN50")])
def test_an_unknown_model_names_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{name}' \(did you mean .*{nearest}.*\?\): pass --model"):
        load_model_config(name)


def test_a_missing_json_file_is_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'no/such/file\.json'.*path to a \.json"):
        load_model_config("no/such/file.json")


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "holds a JSON list")])
def test_a_broken_model_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_model_config(str(path))


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    message = r"unknown key 'patchsize' in vision_cfg of model 'm' \(did you mean patch_size"
    with pytest.raises(ValueError, match=message):
        parse_model_config(model_cfg(vision={"patchsize": 8}), name="m")


def test_a_file_without_a_text_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="model 'm' lacks text_cfg"):
        parse_model_config({"embed_dim": 8, "vision_cfg": {}}, name="m")


@pytest.mark.parametrize("section", ["multimodal_cfg", "audio_cfg", "audio_naflex_cfg", "genlip_cfg", "genlap_cfg"])
def test_other_families_are_refused_by_name(section: str) -> None:
    with pytest.raises(ValueError, match=rf"model 'm' has '{section}': .* not implemented"):
        parse_model_config({**model_cfg(), section: {}}, name="m")


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"image_size": 30}, {}, r"image size 30 x 30 of model 'm' is not divisible .* 8 x 8: pass --force-image-size"),
        ({"layers": [1, 1, 1, 1], "image_size": 48}, {}, r"total stride 32 x 32"),
        ({"layers": [1, 1, 1, 1], "image_size": [32, 64]}, {}, r"position embedding is square"),
        ({"patch_dropout": 1.0}, {}, "--force-patch-dropout"),
        ({"pool_type": "none"}, {}, "one feature per sample"),
        ({"pool_type": "max"}, {}, r"vision_cfg\.pool_type 'max' is none of tok, avg"),
        ({"pos_embed_type": "rope"}, {}, "is none of learnable, sin_cos_2d"),
        ({"attentional_pool": "cascade"}, {}, "marks it as unfinished"),
        ({"scaled_cosine_attn": True}, {}, "vision_cfg of model 'm' has scaled_cosine_attn"),
        ({}, {"output_tokens": True}, "text_cfg of model 'm' has output_tokens"),
        ({}, {"pool_type": "mean"}, "is none of argmax, first, last, eos"),
        ({}, {"context_length": 0}, "--force-context-length"),
        ({}, {"embed_cls": True}, "--force-custom-text"),
    ],
)
def test_what_no_model_can_have_is_refused(vision: dict[str, object], text: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model_config(model_cfg(vision, text), name="m")


def test_hugging_face_text_towers_always_have_the_custom_layout() -> None:
    assert load_model_config("roberta-ViT-B-32").custom_text


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "convnext_base_w", "ViT-B-16-SigLIP", "ViT-L-14-worldwide"])
def test_a_configuration_is_written_back_as_open_clip_reads_it(name: str) -> None:
    config = load_model_config(name)
    written = json.loads(json.dumps(to_open_clip_json(config)))
    assert parse_model_config(written, name=name) == config
    assert written["embed_dim"] == get_model_config(name)["embed_dim"]


def test_sizes_are_one_number_or_two() -> None:
    assert as_pair(224) == as_pair((224,)) == (224, 224)
    assert as_pair((224, 320)) == (224, 320)
    with pytest.raises(ValueError, match="--force-image-size"):
        as_pair((1, 2, 3))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"interpolation": "nearest"}, "--image-interpolation"),
        ({"resize_mode": "crop"}, "--image-resize-mode"),
        ({"mean": (0.5,)}, "--image-mean"),
        ({"std": (1.0, 1.0)}, "--image-std"),
    ],
)
def test_preprocessing_that_does_not_exist_is_refused(options: dict[str, object], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        PreprocessConfig(size=(32, 32), **options)  # type: ignore[arg-type]


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, models.config as c; c.load_model_config('ViT-B-32'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
