"""What wraps a model, on a real device: CUDA graphs, NHWC memory and policies change time and memory, not the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from models.packing import pack_texts
from tests.distributed.test_activation_checkpointing import Operations
from tests.gpu.builders import build_batch, build_model, build_step, weights
from tests.models.tiny import tiny_images, tiny_model
from training.config import EngineConfig
from training.distributed.activation_checkpointing import checkpoint_blocks
from training.distributed.memory_format import image_memory_format
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime

pytestmark = pytest.mark.gpu


def five_steps(device: torch.device, *, size: int = 64, **settings: Any) -> tuple[list[float], torch.Tensor, int]:
    """Losses, weights, and the peak of memory."""
    torch._dynamo.reset()
    model, config = build_model(device)
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=device)
    trained = parallelize(model, config=EngineConfig(device=str(device), **settings), runtime=runtime)
    step = build_step(model, device, precision="amp_bf16", trained=trained)
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for seed in range(5):
        batch = build_batch(config, size, device, seed=seed)
        packed = pack_texts(batch.texts.cpu()).to(device)
        losses.append(step([batch._replace(texts=packed)], lr=1e-4).loss.item())
        with torch.no_grad():  # an evaluation between steps: its features outlive the next call
            first, second = (model.encode_image(batch.images[:8]) for _ in range(2))
            assert torch.equal(first, second)
    return losses, weights(model), torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("strategy", ["block", "model"])
def test_cuda_graphs_repeat_the_steps_of_compiled_kernels(device, strategy):
    compiled = {"torchcompile": True, "torchcompile_strategy": strategy}
    expected, plain, _ = five_steps(device, **compiled)
    found, graphed, _ = five_steps(device, **compiled, torchcompile_mode="reduce-overhead")
    assert found == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(graphed, plain, rtol=0, atol=1e-3)


def test_the_selective_policy_keeps_a_step_and_lies_between_the_others_in_memory(device):
    checkpointed = {"grad_checkpointing": True}
    losses, plain, most = five_steps(device, size=1024)
    _, selective, less = five_steps(device, size=1024, **checkpointed, grad_checkpointing_policy="selective")
    _, full, least = five_steps(device, size=1024, **checkpointed)
    assert most > less > least
    torch.testing.assert_close(selective, plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(full, plain, rtol=0, atol=1e-3)
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", [torch.bfloat16, None])
def test_the_selective_policy_computes_no_product_again(device, precision):
    """Whatever kernels this GPU and this torch choose: none of them has a name that the policy does not know."""
    model, config = build_model(device)
    model.train()
    batch = build_batch(config, 8, device)
    dear = []
    for policy in (None, "selective"):
        if policy is not None:
            checkpoint_blocks([*model.image_blocks, *model.text_blocks], policy=policy)
        with torch.autocast("cuda", precision, enabled=precision is not None):
            output = model(batch.images, pack_texts(batch.texts.cpu()).to(device))
        with Operations() as operations:
            (output.image_features @ output.text_features.T).sum().backward()
        dear.append(operations.dear)
    assert dear[0] == dear[1] > 0


def test_a_convolutional_tower_computes_in_nhwc_memory_by_default(device):
    features = []
    for choice in ("off", "auto"):
        model = tiny_model({"timm_model_name": "test_convnext", "image_size": 64}).to(device).train()
        config = EngineConfig(device=str(device), channels_last=choice)
        parallelize(model, config=config, runtime=Runtime(0, 0, 1, device))
        images = tiny_images(8, size=(64, 64)).to(device)
        features.append(model.encode_image(images))
        features[-1].square().sum().backward()
        assert (image_memory_format(model) is torch.channels_last) == (choice == "auto")
    torch.testing.assert_close(features[0], features[1], rtol=1e-3, atol=1e-4)
