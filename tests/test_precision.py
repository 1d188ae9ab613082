"""Every --precision: the same weights lowered as in OpenCLIP, fp32 features, and a step that learns."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from tests.tiny_clip import split, tiny_batch, tiny_clip
from training.config import LossConfig
from training.losses import build_loss
from training.precision import PRECISIONS, build_precision, cast_parameters
from training.train_step import TrainStep

CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
CONFIGS = {
    "vit": {"vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}},
    "resnet": {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}},
    "timm": {
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
    },
}


def open_clip_model(kind: str, precision: str) -> nn.Module:
    config = CONFIGS[kind]
    cast_dtype = open_clip.get_cast_dtype(precision)
    model = open_clip.CLIP(embed_dim=16, text_cfg=TEXT, **config, cast_dtype=cast_dtype)
    open_clip.factory._set_model_device_and_precision(model, CPU, precision, kind == "timm")
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_same_parameters_are_lowered_as_in_open_clip(name, kind):
    reference = open_clip_model(kind, name)
    model = open_clip_model(kind, "fp32")
    cast_parameters(model, build_precision(name, CPU))
    expected = {name: tensor.dtype for name, tensor in reference.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "autocast", "inputs", "scaled"),
    [
        ("amp", torch.float16, torch.float32, True),
        ("amp_bf16", torch.bfloat16, torch.float32, False),
        ("amp_bfloat16", torch.bfloat16, torch.float32, False),
        ("bf16", None, torch.bfloat16, False),
        ("fp16", None, torch.float16, False),
        ("pure_bf16", None, torch.bfloat16, False),
        ("pure_fp16", None, torch.float16, False),
        ("fp32", None, torch.float32, False),
    ],
)
def test_the_table_means_what_open_clip_means(name, autocast, inputs, scaled):
    precision = build_precision(name, CPU)
    assert (precision.input_dtype, precision.grad_scaler() is not None) == (inputs, scaled)
    with precision.autocast():
        assert torch.is_autocast_enabled("cpu") is (autocast is not None)
        assert autocast in (None, torch.get_autocast_dtype("cpu"))
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (autocast or torch.float32)
    assert len(PRECISIONS) == 8


def test_autocast_is_for_the_type_of_the_device():
    assert build_precision("amp_bf16", torch.device("cuda", 1)).device_type == "cuda"
    assert build_precision("amp_bf16", CPU).device_type == "cpu"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="--precision fp8: unknown; give one of amp_bf16"):
        build_precision("fp8", CPU)


def tiny_model(name: str) -> nn.Module:
    """Weights, and the LayerNorms that the model package keeps computing in their own precision, cast as a whole."""
    model = tiny_clip()
    return model.to(build_precision(name, CPU).weight_dtype)


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_step_in_every_precision_has_fp32_features_and_lowers_the_loss(name, accum_freq):
    precision, model = build_precision(name, CPU), tiny_model(name)
    scaler = precision.grad_scaler()
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})
    batch = tiny_batch(16)
    batch = batch._replace(images=batch.images.to(precision.input_dtype))
    with precision.autocast():
        output = model(batch.images, batch.texts)
    assert output.image_features.dtype == output.text_features.dtype == torch.float32
    step = TrainStep(
        model=model,
        loss=build_loss(LossConfig()),
        optimizer=torch.optim.AdamW(model.parameters(), eps=1e-4),
        precision=precision,
        scaler=scaler,
    )
    losses = [step(split(batch, accum_freq), lr=0.01).loss for _ in range(12)]
    assert losses[0].dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]
