from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from tests.models.tiny import CONVNEXT, RESNET, tiny_images, tiny_model, tiny_texts


def test_features_have_length_one_and_the_scale_is_the_exponential() -> None:
    output = tiny_model()(tiny_images(), tiny_texts())
    for features in (output.image_features, output.text_features):
        assert features.shape == (2, 24)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    assert output.logit_scale.shape == ()
    assert output.logit_scale.item() == pytest.approx(1 / 0.07)
    assert output.logit_bias is None


@pytest.mark.parametrize("nonscalar", [False, True])
def test_scale_and_bias_have_no_dims_in_either_storage(nonscalar: bool) -> None:
    model = tiny_model(init_logit_scale=math.log(10), init_logit_bias=-10, nonscalar_logit_scale=nonscalar)
    assert model.logit_scale.shape == model.logit_bias.shape == ((1,) if nonscalar else ())
    output = model(tiny_images(), tiny_texts())
    assert output.logit_scale.shape == output.logit_bias.shape == ()
    assert output.logit_scale.item() == pytest.approx(10)
    assert output.logit_bias.item() == -10


@pytest.mark.parametrize("vision", [{}, RESNET, {**CONVNEXT, "image_size": 32}])
def test_under_bf16_autocast_the_output_is_fp32(vision: dict[str, object]) -> None:
    model = tiny_model(vision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tiny_images(), tiny_texts())
        assert model.encode_image(tiny_images()).dtype == torch.bfloat16
    for tensor in (output.image_features, output.text_features, output.logit_scale):
        assert tensor.dtype == torch.float32
    # Normalised after the cast: lengths are exact to fp32, not to the 3 digits of bf16.
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(2), atol=1e-6, rtol=0)


def test_low_precision_weights_still_give_fp32_output() -> None:
    model = tiny_model(init_logit_bias=-10).bfloat16()
    output = model(tiny_images().bfloat16(), tiny_texts())
    assert {tensor.dtype for tensor in output} == {torch.float32}


def test_fp64_stays_fp64() -> None:
    output = tiny_model().double()(tiny_images().double(), tiny_texts())
    assert output.image_features.dtype == output.logit_scale.dtype == torch.float64


@pytest.mark.parametrize("custom_text", [False, True])
def test_every_parameter_gets_a_gradient(custom_text: bool) -> None:
    model = tiny_model(custom_text=custom_text, init_logit_bias=-10).train()
    output = model(tiny_images(), tiny_texts())
    logits = output.logit_scale * output.image_features @ output.text_features.T + output.logit_bias
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("vision", [{}, RESNET, CONVNEXT])
def test_copies_and_pickles_are_independent_and_equal(vision: dict[str, object]) -> None:
    model = tiny_model(vision)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
        inside = {id(module) for module in twin.modules()}
        assert all(id(block) in inside for block in (*twin.image_blocks, *twin.text_blocks))


def test_moving_a_model_moves_what_its_forward_uses() -> None:
    """In the classic layout the parts of the text tower live on the model itself; none may be left behind."""
    model = tiny_model().to("meta")
    output = model(tiny_images().to("meta"), tiny_texts().to("meta"))
    assert output.text_features.device.type == "meta"
