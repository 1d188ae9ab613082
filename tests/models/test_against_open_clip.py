"""The promise to OpenCLIP's users: the same weights, names and features, and checkpoints both ways."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import list_models, load_model_config, parse_model_config
from models.factory import build_model, create_model
from tests.models.tiny import (
    CONVNEXT,
    RESNET,
    TIMM_RESNET,
    TIMM_VIT,
    model_cfg,
    open_clip_model,
    tiny_images,
    tiny_texts,
)

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "average pool": ({"pool_type": "avg"}, {}, {}),
    "norm after pool": ({"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {}, {}),
    "class token, norm after pool": ({"final_ln_after_pool": True}, {}, {}),
    "rectangle": ({"image_size": [32, 48]}, {}, {}),
    "layer scale": ({"ls_init_value": 0.1}, {"ls_init_value": 0.2}, {"quick_gelu": True}),
    "first token": ({}, {"pool_type": "first", "no_causal_mask": True}, {"custom_text": True}),
    "last token": ({}, {"pool_type": "last", "proj_bias": True}, {}),
    "eos token": ({}, {"pool_type": "eos", "eos_id": 49, "proj_bias": True}, {"custom_text": True}),
    "no projection": ({}, {"proj_type": "none"}, {"embed_dim": 48}),
    "logit bias": ({}, {}, {"init_logit_bias": -10, "init_logit_scale": 2.3}),
    "temperature of one dim": ({}, {}, {"nonscalar_logit_scale": True, "init_logit_bias": -10}),
    "norm and activation options": (
        {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
        {},
    ),
    "attentional pool": ({"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}, {}, {}),
    "fixed positions": ({"pos_embed_type": "sin_cos_2d"}, {}, {}),
    "custom blocks": (
        {"qk_norm": True, "scale_heads": True, "scale_attn": True},
        {"scale_fc": True, "scale_attn_inner": True},
        {},
    ),
    "custom text blocks": ({"block_type": "custom"}, {"block_type": "custom", "qk_norm": True}, {"custom_text": True}),
    "class embedding in text": ({}, {"embed_cls": True}, {"custom_text": True}),
    "resnet": (RESNET, {}, {}),
    "convnext": (CONVNEXT, {}, {}),
    "convnext with mlp head": ({**CONVNEXT, "timm_proj": "mlp", "timm_drop": 0.1, "timm_drop_path": 0.1}, {}, {}),
    "timm projects itself": ({**CONVNEXT, "timm_proj": ""}, {}, {}),
    "timm vit": (TIMM_VIT, {}, {"custom_text": True, "init_logit_bias": -10}),
    "timm vit without projection": ({**TIMM_VIT, "timm_pool": "avg", "timm_proj": "none"}, {}, {"embed_dim": 64}),
    "timm attention pool": ({**TIMM_RESNET, "timm_pool": "abs_attn", "timm_proj": ""}, {}, {}),
    "timm rotary pool": ({**TIMM_RESNET, "timm_pool": "rot_attn", "timm_proj_bias": True}, {}, {}),
}
# md5 over the sorted state dict after torch.manual_seed(0); the same in OpenCLIP 3.3.0 and HEAD.
GOLDEN_SEED_0 = {
    "ViT-B-32": "8d60527c0ca2a189ff0031410ff0b1e2",
    "convnext_base_w": "adfca213148ab478d95fb5c11b4e264e",
    "RN50": "b2f2893dbe8c7211b40ea3d43f045894",
}
FULL_SIZE = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-32-256", "ViT-B-16", "ViT-L-14", "convnext_base_w", "RN50")


def parameter_list(model: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in model.named_parameters()]


def state_list(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def digest(model: nn.Module) -> str:
    md5 = hashlib.md5()
    for key, tensor in sorted(model.state_dict().items()):
        md5.update(key.encode())
        md5.update(tensor.numpy().tobytes())
    return md5.hexdigest()


def features(model: Any, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_gives_the_weights_and_features_of_open_clip(variant: str) -> None:
    vision, text, top = VARIANTS[variant]
    cfg = model_cfg(vision, text, **top)
    reference = open_clip_model(cfg, seed=3)
    torch.manual_seed(3)
    model = build_model(parse_model_config(cfg, name=variant)).eval()
    assert parameter_list(model) == parameter_list(reference)
    assert state_list(model) == state_list(reference)
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))
    images, texts = tiny_images(3, size=model.config.vision_cfg.image_hw).double(), tiny_texts(3)
    expected = features(reference.double(), images, texts)
    for ours, theirs in zip(features(model.double(), images, texts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_the_weights_and_features_of_open_clip(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(load_model_config(name)).eval()
    if name in GOLDEN_SEED_0 and digest(model) != GOLDEN_SEED_0[name]:
        # Truncated normal numbers differ in their last bits between kinds of processors: then OpenCLIP's do too.
        torch.manual_seed(0)
        assert digest(model) == digest(open_clip_model(name))
    with torch.device("meta"):
        reference = open_clip_model(name)
    reference.attn_mask = torch.full((77, 77), float("-inf")).triu(1)  # the one tensor that is not in its state dict
    images = tiny_images(1, size=model.config.vision_cfg.image_hw)
    texts = torch.randint(1, 49_407, (2, 77), generator=torch.Generator().manual_seed(3))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model.to(dtype)
        reference.load_state_dict(model.state_dict(), assign=True)  # the same memory: ViT-L-14 is 3.4 GB in fp64
        expected = features(reference, images.to(dtype), texts)
        for ours, theirs in zip(features(model, images.to(dtype), texts), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    del model, reference
    gc.collect()


@pytest.mark.parametrize("name", list_models())
def test_every_built_in_model_has_the_names_and_shapes_of_open_clip(name: str) -> None:
    """Without memory; Hugging Face towers are tested in their own file."""
    config = load_model_config(name)
    if config.text_cfg.hf_model_name is not None:
        assert config.custom_text
        return
    model = build_model(config, device="meta")
    with torch.device("meta"):
        reference = open_clip_model(name)
    assert parameter_list(model) == parameter_list(reference)
    assert state_list(model) == state_list(reference)
    assert model.image_blocks
    assert model.text_blocks


def test_of_the_built_in_models_only_coca_is_refused() -> None:
    refused = set(open_clip.list_models()) - set(list_models())
    assert refused == {name for name in open_clip.list_models() if name.startswith("coca")}
    for name in refused:
        with pytest.raises(ValueError, match=f"model '{name}' has 'multimodal_cfg': CoCa"):
            load_model_config(name)


@pytest.fixture
def registered(tmp_path: Path) -> str:
    """A tiny model that open_clip knows by name and we know by path."""
    path = tmp_path / "tiny-registered.json"
    path.write_text(json.dumps(model_cfg()))
    open_clip.add_model_config(tmp_path)
    return str(path)


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_checkpoint_written_here_loads_in_open_clip(registered: str, tmp_path: Path, custom_text: bool) -> None:
    model = create_model(registered, force_custom_text=custom_text).model.eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
    theirs, _, _ = open_clip.create_model_and_transforms(
        "tiny-registered", pretrained=str(tmp_path / "epoch_1.pt"), force_custom_text=custom_text
    )
    images, texts = tiny_images(), tiny_texts()
    for ours, other in zip(features(model, images, texts), features(theirs.eval(), images, texts), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["3.3.0 distributed", "HEAD", "bare", "safetensors"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip_checkpoints_load_here(registered: str, tmp_path: Path, layout: str, custom_text: bool) -> None:
    reference = open_clip_model(model_cfg(), seed=5)
    state = reference.state_dict()
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pt")
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "bare":
        torch.save(state, path)
    elif layout == "HEAD":
        torch.save({"epoch": 1, "name": "run", "state_dict": state, "global_step": 3}, path)
    else:
        torch.save({"epoch": 1, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    model = create_model(registered, pretrained=str(path), force_custom_text=custom_text).model.eval()
    images, texts = tiny_images(), tiny_texts()
    for ours, other in zip(features(model, images, texts), features(reference, images, texts), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "context"), [(48, 12), ((32, 64), 12), (32, 20), (16, 7)])
def test_position_embeddings_are_resized_as_in_open_clip(
    registered: str, tmp_path: Path, size: int | tuple[int, int], context: int
) -> None:
    torch.save(open_clip_model(model_cfg(), seed=6).state_dict(), tmp_path / "weights.pt")
    weights = str(tmp_path / "weights.pt")
    model = create_model(registered, pretrained=weights, force_image_size=size, force_context_length=context).model
    reference = open_clip.create_model(
        "tiny-registered", pretrained=weights, force_image_size=size, force_context_length=context
    )
    assert state_list(model) == state_list(reference)
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))
