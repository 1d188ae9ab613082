"""The losses of one process, against OpenCLIP's in fp64 and against their definitions."""

from __future__ import annotations

import open_clip.loss
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import LossConfig
from training.losses import build_loss, describe_loss
from training.losses.clip_loss import ClipLoss
from training.losses.siglip_loss import SiglipLoss

ROWS, EMBEDDING = 24, 10
TILES = [1, 5 * ROWS, 8 * ROWS, ROWS * ROWS, 10**6]


def random_inputs(*, bias: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Features, exponential scale and bias: leaves."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, ROWS, EMBEDDING, generator=generator, dtype=torch.float64)
    images, texts = F.normalize(rows, dim=-1).to(dtype)
    values = [images, texts, torch.tensor(14.3, dtype=dtype), torch.tensor(-9.0, dtype=dtype) if bias else None]
    return [None if value is None else value.detach().requires_grad_() for value in values]


def value_and_gradients(loss, inputs) -> list[Tensor]:
    value = loss(*inputs)
    value.backward()
    return [value.detach(), *(tensor.grad for tensor in inputs if tensor is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_clip_loss_equals_open_clip(bias, local):
    ours = value_and_gradients(build_loss(LossConfig(local_loss=local)), random_inputs(bias=bias))
    reference = value_and_gradients(open_clip.loss.ClipLoss(), random_inputs(bias=bias))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile_elements", TILES)
def test_clip_loss_equals_open_clip_for_any_tile(tile_elements):
    ours = value_and_gradients(ClipLoss(tile_elements=tile_elements), random_inputs(bias=False))
    reference = value_and_gradients(open_clip.loss.ClipLoss(), random_inputs(bias=False))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile_elements", TILES)
def test_siglip_loss_equals_open_clip_for_any_tile(tile_elements):
    ours = value_and_gradients(SiglipLoss(tile_elements=tile_elements), random_inputs(bias=True))
    reference = value_and_gradients(open_clip.loss.SigLipLoss(), random_inputs(bias=True))
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)


def test_siglip_loss_without_a_bias_is_that_with_bias_zero():
    images, texts, scale, _ = random_inputs(bias=False)
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(SiglipLoss()(images, texts, scale, None), SiglipLoss()(images, texts, scale, zero))


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(siglip=True)])
def test_half_precision_features_are_scored_in_fp32_also_under_autocast(config):
    inputs = random_inputs(bias=True, dtype=torch.bfloat16)
    exact = build_loss(config)(*(tensor.double() for tensor in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = build_loss(config)(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_well_matched_siglip_pair_still_has_a_gradient_in_fp32():
    images = torch.eye(2, requires_grad=True)
    SiglipLoss()(images, torch.eye(2), torch.tensor(30.0), torch.tensor(-10.0)).backward()
    expected = -30.0 * torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64)) / 2
    assert images.grad[0, 0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_unknown_siglip_implementation_is_refused():
    with pytest.raises(ValueError, match="--loss-dist-impl ring: unknown; give one of bidir, shift, reduce, gather"):
        build_loss(LossConfig(siglip=True, loss_dist_impl="ring"))


def test_an_unknown_type_for_the_gather_is_refused():
    with pytest.raises(ValueError, match="--gather-dtype fp8: unknown; give one of fp32, bf16"):
        build_loss(LossConfig(gather_dtype="fp8"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LossConfig(), "although --gather-with-grad is not given"),
        (LossConfig(), "although --local-loss is not given"),
        (LossConfig(loss_dist_impl="shift"), "--loss-dist-impl has no effect without --siglip"),
        (LossConfig(siglip=True, local_loss=True), "have no effect with --siglip"),
        (LossConfig(siglip=True, loss_dist_impl="bidir"), "bidir: computed as 'gather'"),
        (LossConfig(gather_dtype="bf16"), "rounded to bf16 for the gather, half of its bytes"),
    ],
)
def test_flags_that_mean_something_else_here_are_said(config, said):
    assert any(said in line for line in describe_loss(config, world_size=2))


def test_a_plain_choice_is_described_in_one_line():
    assert len(describe_loss(LossConfig(local_loss=True, gather_with_grad=True), world_size=2)) == 1
    assert len(describe_loss(LossConfig(siglip=True, loss_dist_impl="gather"), world_size=2)) == 1


def test_one_process_is_told_what_concerns_it():
    assert len(describe_loss(LossConfig(), world_size=1)) == 1
    lines = describe_loss(LossConfig(gather_dtype="bf16"), world_size=1)
    assert lines[1:] == ["--gather-dtype bf16 has no effect: one process gathers nothing"]
