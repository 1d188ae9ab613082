from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from open_clip.pretrained import _PRETRAINED
from timm.models._registry import _model_pretrained_cfgs

from models.config import OPENAI_MEAN, OPENAI_STD
from models.factory import create_model
from models.transformer import QuickGELU
from tests.models.tiny import TIMM_VIT, model_cfg, tiny_images, tiny_model, tiny_texts, write_model_file


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_model_file(tmp_path))


def test_force_flags_change_model_and_configuration(tiny: str) -> None:
    built = create_model(
        tiny,
        force_quick_gelu=True,
        force_custom_text=True,
        force_patch_dropout=0.5,
        force_image_size=(64, 32),
        force_context_length=20,
        init_logit_scale=2.0,
        init_logit_bias=-10.0,
    )
    model, config = built.model, built.config
    assert isinstance(model.visual.blocks[0].mlp.gelu, QuickGELU)
    assert isinstance(model.text.blocks[0].mlp.gelu, QuickGELU)
    assert model.visual.patch_dropout.probability == 0.5
    assert model.visual.positional_embedding.shape == (8 * 4 + 1, 64)
    assert model.text.positional_embedding.shape == (20, 48)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (2.0, -10.0)
    assert (config.quick_gelu, config.custom_text, config.vision_cfg.image_size) == (True, True, (64, 32))
    assert (built.preprocess.size, model.context_length) == ((64, 32), 20)
    assert model.config == config


@pytest.mark.parametrize("size", [64, (64,), (64, 64), [64]])
def test_a_square_size_is_stored_as_one_number(tiny: str, size: int | tuple[int, ...]) -> None:
    assert create_model(tiny, force_image_size=size).config.vision_cfg.image_size == 64


def test_a_forced_size_is_checked(tiny: str) -> None:
    with pytest.raises(ValueError, match=r"image size 60 x 60 .* patch size 8 x 8.*--force-image-size"):
        create_model(tiny, force_image_size=60)


def test_a_model_without_memory_has_shapes_only(tiny: str) -> None:
    built = create_model(tiny, device="meta")
    assert {parameter.device.type for parameter in built.model.parameters()} == {"meta"}


def test_weights_cannot_be_loaded_into_a_model_without_memory(tiny: str, tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="device 'meta' has no memory for the weights"):
        create_model(tiny, pretrained=str(tmp_path / "w.pt"), device="meta")


def test_the_seed_decides_the_weights(tiny: str) -> None:
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        digests.append(create_model(tiny).model.visual.proj.sum().item())
    assert digests[0] == digests[1] != digests[2]


def test_preprocessing_is_openais_unless_something_says_otherwise(tiny: str) -> None:
    preprocess = create_model(tiny).preprocess
    assert (preprocess.mean, preprocess.std) == (OPENAI_MEAN, OPENAI_STD)
    assert (preprocess.interpolation, preprocess.resize_mode) == ("bicubic", "shortest")


def test_flags_override_preprocessing(tiny: str) -> None:
    preprocess = create_model(
        tiny, image_mean=(0.5,), image_std=(0.1, 0.2, 0.3), image_interpolation="bilinear", image_resize_mode="squash"
    ).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    assert (preprocess.interpolation, preprocess.resize_mode) == ("bilinear", "squash")


@pytest.fixture
def tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tag of the tiny model in open_clip's registry, whose weights are already on this machine."""
    torch.save(tiny_model(seed=9).state_dict(), tmp_path / "published.pt")
    published = {"mean": (0.5, 0.5, 0.5), "resize_mode": "squash", "quick_gelu": True}
    published["file"] = str(tmp_path / "published.pt")
    monkeypatch.setitem(_PRETRAINED, "tiny", {"published": published, "lost": {"url": "file:///nowhere/lost.pt"}})
    return "published"


def test_a_tag_brings_weights_and_preprocessing(tiny: str, tag: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built = create_model(tiny, pretrained=tag, image_resize_mode="longest")
    assert torch.equal(built.model.visual.proj, tiny_model(seed=9).visual.proj)
    assert built.preprocess.mean == (0.5, 0.5, 0.5)
    assert built.preprocess.resize_mode == "longest"
    assert "trained with quick_gelu=True, model '" in caplog.text
    assert "--force-quick-gelu" in caplog.text


@pytest.mark.usefixtures("tag")
def test_an_unknown_tag_lists_those_of_the_model(tiny: str) -> None:
    with pytest.raises(ValueError, match="'typo' is neither a file nor a tag of .*: its tags are published, lost"):
        create_model(tiny, pretrained="typo")
    with pytest.raises(ValueError, match="a tag of model 'ViT-M-32': it has no tags"):
        create_model("ViT-M-32", pretrained="openai")


@pytest.mark.usefixtures("tag")
def test_a_failed_download_says_what_to_do(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"could not download tag 'lost' of tiny .*pass the file to --pretrained"):
        create_model(tiny, pretrained="lost", cache_dir=str(tmp_path / "cache"))


def test_a_local_directory_brings_weights_and_preprocessing(tmp_path: Path) -> None:
    content = {"model_cfg": model_cfg(), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert create_model(f"local-dir:{tmp_path}").preprocess.mean == (0.1, 0.2, 0.3)
    torch.save(tiny_model(seed=9).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save(tiny_model(seed=8).state_dict(), tmp_path / "model.pth")
    model = create_model(f"local-dir:{tmp_path}").model
    reference = open_clip.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(model.visual.proj, tiny_model(seed=9).visual.proj)
    assert torch.equal(model.visual.proj, reference.visual.proj)


def test_the_hub_is_asked_for_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": model_cfg()}))
    asked: list[tuple[str, str]] = []

    def download(repository: str, filename: str, **_: object) -> str:
        asked.append((repository, filename))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RuntimeError, match="could not download the weights of hf-hub:org/repo"):
        create_model("hf-hub:org/repo", cache_dir=str(tmp_path / "cache"))
    assert asked == [("org/repo", "open_clip_config.json")]


def test_image_weights_of_timm_need_a_timm_tower(tiny: str) -> None:
    with pytest.raises(ValueError, match=r"--pretrained-image loads timm's weights, and the image tower of .* is not"):
        create_model(tiny, pretrained_image=True)


def test_image_weights_are_superseded_by_clip_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(write_model_file(tmp_path, vision=TIMM_VIT))
    torch.save(tiny_model(TIMM_VIT, seed=4).state_dict(), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING):
        built = create_model(name, pretrained=str(tmp_path / "w.pt"), pretrained_image=True)
    assert "--pretrained-image has no effect" in caplog.text
    assert not built.config.vision_cfg.timm_model_pretrained


def test_image_weights_come_from_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = timm.create_model("test_vit")
    torch.save(trunk.state_dict(), tmp_path / "timm.pt")
    published = replace(_model_pretrained_cfgs["test_vit"], file=str(tmp_path / "timm.pt"))
    monkeypatch.setitem(_model_pretrained_cfgs, "test_vit", published)  # a file instead of the network
    name = str(write_model_file(tmp_path, vision=TIMM_VIT))
    built = create_model(name, pretrained_image=True)
    assert torch.equal(built.model.visual.trunk.pos_embed, trunk.pos_embed)
    assert not torch.equal(create_model(name).model.visual.trunk.pos_embed, trunk.pos_embed)


def test_a_timm_trunk_is_resized_as_in_open_clip(tmp_path: Path) -> None:
    name = str(write_model_file(tmp_path, name="tiny-timm-size", vision=TIMM_VIT))
    open_clip.add_model_config(Path(name))
    torch.save(tiny_model(TIMM_VIT, seed=4).state_dict(), tmp_path / "w.pt")
    built = create_model(name, pretrained=str(tmp_path / "w.pt"), force_image_size=(96, 128))
    reference = open_clip.create_model("tiny-timm-size", pretrained=str(tmp_path / "w.pt"), force_image_size=(96, 128))
    assert torch.equal(built.model.visual.trunk.pos_embed, reference.visual.trunk.pos_embed)
    built.model.eval()(tiny_images(size=(96, 128)), tiny_texts())
    assert built.preprocess.size == (96, 128)


def test_weights_of_a_resized_timm_trunk_load_again(tmp_path: Path) -> None:
    name = str(write_model_file(tmp_path, vision=TIMM_VIT))
    first = create_model(name, force_image_size=128).model
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second = create_model(name, force_image_size=128, pretrained=str(tmp_path / "w.pt")).model
    assert torch.equal(first.visual.trunk.pos_embed, second.visual.trunk.pos_embed)


def test_a_siglip_model_has_a_bias_and_the_custom_layout() -> None:
    model = create_model("ViT-B-16-SigLIP", device="meta").model
    assert model.logit_bias.shape == ()
    assert {"text.text_projection.bias", "visual.trunk.attn_pool.latent"} <= model.state_dict().keys()
