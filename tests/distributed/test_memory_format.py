"""NHWC memory: which towers get it, that only the order of memory changes, and that all who read weights cope."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.checkpoint.tiny_run import ALONE
from tests.distributed.launch import current_runtime, run_ranks
from tests.models.tiny import CONVNEXT, RESNET, TIMM_RESNET, TIMM_VIT, tiny_images, tiny_model, tiny_texts
from tests.test_train_step import build_step
from training.config import EngineConfig, OptimConfig
from training.data.batch import DeviceBatch, normalize
from training.distributed.collectives import rank, world_size
from training.distributed.memory_format import apply_channels_last, image_memory_format, wants_channels_last
from training.distributed.parallelize import parallelize
from training.distributed.sharding import local_parameters
from training.optim.optimizer import build_optimizer
from training.resilience.replicas import replica_checksum

TINY = {"timm_model_name": "test_convnext", "image_size": 32}
NHWC = EngineConfig(device="cpu", channels_last="on")


@pytest.mark.parametrize(
    ("vision", "convolutional"),
    [({}, False), (TIMM_VIT, False), (CONVNEXT, True), (TIMM_RESNET, True), (RESNET, True)],
)
def test_towers_with_convolutions_of_overlapping_windows_are_reordered_on_a_gpu(vision, convolutional: bool) -> None:
    model = tiny_model(vision)
    assert wants_channels_last(model, "auto", device_type="cuda") == convolutional
    assert wants_channels_last(model, "on", device_type="cpu") == convolutional
    assert not wants_channels_last(model, "auto", device_type="cpu")
    assert not wants_channels_last(model, "off", device_type="cuda")


def test_a_tower_of_patches_is_left_as_it_is_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    with caplog.at_level(logging.INFO):
        parallelize(model, config=NHWC, runtime=ALONE)
    assert "--channels-last on has no effect" in caplog.text
    assert image_memory_format(model) is torch.preserve_format


@pytest.mark.parametrize("is_sharded", [False, True])
def test_images_come_in_the_order_of_the_tower_whatever_its_weights_have(is_sharded: bool) -> None:
    model = tiny_model(TINY)
    apply_channels_last(model, is_sharded=is_sharded)
    assert image_memory_format(model) is torch.channels_last
    stem = next(module for module in model.visual.modules() if isinstance(module, torch.nn.Conv2d))
    assert stem.weight.is_contiguous() == is_sharded


def conversions(model: torch.nn.Module, images: Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.visual(images).sum().backward()
    return sum(event.count for event in profiler.key_averages() if event.key in ("aten::clone", "aten::contiguous"))


def test_within_the_tower_fewer_tensors_are_reordered_than_before() -> None:
    plain, reordered = tiny_model(TINY).train(), tiny_model(TINY).train()
    parallelize(reordered, config=NHWC, runtime=ALONE)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found, count = [], []
    for model in (plain, reordered):
        images = normalize(pixels, mean=[0.5] * 3, std=[0.5] * 3, memory_format=image_memory_format(model))
        count.append(conversions(model, images))
        found.append((images, [parameter.grad for parameter in model.visual.parameters()]))
    assert count[1] < count[0]
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def train(model: torch.nn.Module, **settings: Any) -> dict[str, Tensor]:
    """Weights after three steps of this rank's half of eight pairs."""
    opt = settings.pop("opt", "adamw")
    config = EngineConfig(device="cpu", **settings)
    trained = parallelize(model, config=config, runtime=current_runtime() if world_size() > 1 else ALONE)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, opt=opt))
    step = build_step(model, trained=trained, optimizer=optimizer)
    batch = DeviceBatch(tiny_images(8), tiny_texts(8))
    own = DeviceBatch(*(part.chunk(world_size())[rank()] for part in batch[:2]))
    for _ in range(3):
        step([own], lr=1e-3)
    assert len(replica_checksum(model, optimizer)) > 0
    return {name: value.detach().clone() for name, value in local_parameters(model).items()}


def train_on_two_ranks() -> list[dict[str, Tensor]]:
    cases: list[dict[str, Any]] = [{}, {"opt": "stableadamw"}, {"fsdp": True}]
    found = []
    for case in cases:
        plain, reordered = (train(tiny_model(TINY).train(), channels_last=choice, **case) for choice in ("off", "on"))
        found.append({name: reordered[name] - plain[name] for name in plain})
    return found


def test_ddp_and_fsdp_train_reordered_weights_like_plain_ones() -> None:
    for cases in run_ranks(2, train_on_two_ranks, timeout_s=120):
        for difference in cases:
            # Steps of 1e-3: where a gradient is nearly zero its sign is not defined.
            assert max(value.abs().mean() for value in difference.values() if value.numel()) < 1e-4
