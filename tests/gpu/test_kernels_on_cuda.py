"""Kernels that a GPU has and a CPU has not: attention by name, the fastest by measurement, products in fp8."""

from __future__ import annotations

import pytest
import torch

from models.packing import pack_texts
from tests.gpu.builders import build_batch, build_model, build_step
from training.attention_kernel import KERNELS, AttentionCall, choose, enabled, measure, why_not
from training.fp8 import refusal, use_fp8

pytestmark = pytest.mark.gpu
CALL = AttentionCall("image", 64, 12, 50, 50, 64, None, False, torch.bfloat16)


def test_the_fastest_kernel_is_measured_and_comes_first(device):
    choice = choose("fastest", [CALL], device=device)
    assert choice.order[-1] == "math"
    assert set(choice.order) == set(KERNELS)
    times = {name: measure(name, CALL, device=device) for name in KERNELS if not why_not(name, CALL, device=device)}
    assert times[choice.order[0]] <= 1.5 * min(times.values())


@pytest.mark.parametrize("name", list(KERNELS))
def test_every_kernel_computes_the_same_step(device, name):
    if reason := why_not(name, CALL, device=device):
        pytest.skip(reason)
    losses = []
    for order in ((), (name, "math")):
        model, config = build_model(device)
        step = build_step(model, device, precision="amp_bf16")
        with enabled(order):
            losses.append(step([build_batch(config, 32, device)], lr=1e-3).loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_a_kernel_without_fp32_says_so(device):
    call = CALL._replace(dtype=torch.float32)
    with pytest.raises(ValueError, match="--attention-kernel flash cannot compute 64 sequences of 50 image tokens"):
        choose("flash", [call], device=device)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(("size", "packed_to"), [(256, None), (256, 16), (256, 32), (24, None)])
def test_an_fp8_step_learns_like_one_in_bf16(device, recipe, size, packed_to):
    pytest.importorskip("torchao")
    if reason := refusal("cuda", torch.cuda.get_device_capability(device), name="this GPU", has_torchao=True):
        pytest.skip(reason)
    losses, norms = [], []
    for converts in (False, True):
        model, config = build_model(device)
        length = packed_to or config.text_cfg.context_length
        if converts:
            blocks = [*model.image_blocks, *model.text_blocks]
            arguments = {"batch_size": size, "text_length": length, "will_be_compiled": False}
            use_fp8(blocks, recipe, device=device, **arguments)
        step = build_step(model, device, precision="amp_bf16", clip=1.0)
        batch = build_batch(config, size, device)
        if packed_to is not None:
            texts = batch.texts.cpu()[:, :length]
            batch = batch._replace(texts=pack_texts(texts).to(device))
        steps = [step([batch], lr=1e-3) for _ in range(10)]
        losses.append([metrics.loss.item() for metrics in steps])
        norms.append([metrics.grad_norm.item() for metrics in steps])
    assert losses[1][-1] < losses[1][0] - 0.1
    assert losses[1][0] == pytest.approx(losses[0][0], abs=0.1)
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.2, abs=0.2)
    assert norms[1][0] == pytest.approx(norms[0][0], rel=0.2)
    assert losses[1] != losses[0]
