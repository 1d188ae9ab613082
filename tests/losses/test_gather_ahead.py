"""Texts fly while images are encoded, and their gradients fly back: when, how many bytes, and how rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.scale_world import LiveMemory, fake_world
from models.config import load_model_config
from models.factory import build_model
from tests.distributed.launch import current_runtime, run_ranks
from tests.models.tiny import tiny_images, tiny_model, tiny_texts
from tests.test_train_step import build_step
from training.config import EngineConfig, LossConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import GatheredRows, WayBack, all_reduce_sum, rank, world_size
from training.distributed.parallelize import parallelize
from training.losses import Loss, build_loss
from training.train_step import texts_hide_more_than_they_expose

LOSSES = [LossConfig(), LossConfig(siglip=True)]
CASES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "static graph, checkpointed": {"ddp_static_graph": True, "grad_checkpointing": True},
    "FSDP": {"fsdp": True},
    "locked image tower": {"locked": "visual"},
    "locked text tower": {"locked": "text"},
}
FORWARD = ["text tower", "gather begins", "image tower", "texts are needed"]
BACKWARD = ["return begins", "image gradients", "return is needed", "text gradients"]


def spy(events: list[str], owner: type, method: str, event: str) -> None:
    """From now on, in this process."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    setattr(owner, method, call)


def watch(events: list[str], block: torch.nn.Module, tower: str) -> None:
    def after(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        events.append(f"{tower} tower")
        if output.requires_grad:
            output.register_hook(lambda gradient: events.append(f"{tower} gradients"))

    block.register_forward_hook(after)


def events_of_all_cases() -> dict[tuple[str, str], list[str]]:
    """What happened on this rank in the first and the second of two steps, in order."""
    events: list[str] = []
    spy(events, Loss, "begin", "gather begins")
    spy(events, GatheredRows, "take", "texts are needed")
    spy(events, WayBack, "begin", "return begins")
    spy(events, WayBack, "end", "return is needed")
    found = {}
    for name, options in CASES.items():
        engine, model = dict(options), tiny_model().train()
        locked = engine.pop("locked", None)
        for key, parameter in model.named_parameters():
            tower = "visual" if key.startswith("visual") else "text"
            parameter.requires_grad_(key == "logit_scale" or tower != locked)
        watch(events, model.image_blocks[0], "image")
        watch(events, model.text_blocks[0], "text")
        config = EngineConfig(device="cpu", **engine)
        trained = parallelize(model, config=config, runtime=current_runtime())
        step = build_step(model, trained=trained, texts_first=True)
        for number in ("first", "second"):
            events.clear()
            step([DeviceBatch(tiny_images(4), tiny_texts(4))], lr=0.1)
            found[name, number] = events.copy()
    return found


@pytest.fixture(scope="module")
def events() -> list[dict[tuple[str, str], list[str]]]:
    return run_ranks(2, events_of_all_cases)


@pytest.mark.parametrize("case", CASES)
def test_the_image_tower_computes_while_texts_and_their_gradients_fly(case, events):
    expected = FORWARD + BACKWARD
    if case == "locked image tower":
        expected.remove("image gradients")
    if case == "locked text tower":
        expected = [*FORWARD, "image gradients"]  # nobody asks for gradients of texts: none are sent
    assert [found[case, "second"] for found in events] == [expected] * 2


def test_the_exchange_before_the_first_step_has_its_order_of_towers(events):
    """DDP cuts its buckets in the order in which gradients come in that exchange."""
    of_a_step = ["text tower", "image tower", "image gradients", "text gradients"]
    for found in events:
        assert [event for event in found["DDP", "first"] if event in of_a_step] == of_a_step * 2


def features(rows: int, dtype: torch.dtype = torch.float32, *, scale: float = 30.0) -> list[Tensor]:
    """Normalised rows of a model in training (a text is closer to its image than to others), scale and bias."""
    generator = torch.Generator().manual_seed(3)
    images, noise = torch.randn(2, rows, 64, generator=generator, dtype=torch.float64)
    values = (F.normalize(images), F.normalize(images + 2 * noise), torch.tensor(scale), torch.tensor(-5.0))
    return [value.to(dtype) for value in values]


def loss_and_gradients(config: LossConfig, values: list[Tensor]) -> list[Tensor]:
    """Of the mean over ranks, with respect to this rank's features, and to the scalars."""
    inputs = [value.chunk(world_size())[rank()] if value.ndim else value for value in values]
    inputs = [value.clone().requires_grad_() for value in inputs]
    loss = build_loss(config)(*inputs)
    loss.backward()
    images, texts, *scalars = [value.grad / world_size() for value in inputs]
    return [images, texts, *map(all_reduce_sum, (loss / world_size(), *scalars))]


def both_losses_on_ranks() -> list[list[Tensor]]:
    configs = [LossConfig(siglip=config.siglip, gather_dtype="bf16") for config in LOSSES]
    return [loss_and_gradients(config, features(64)) for config in configs]


def test_texts_in_bf16_are_rounded_on_all_ranks_and_nothing_else_is():
    """The rank's own texts, too: both ranks' losses are those of one process on rounded texts."""
    images, texts, *scalars = features(64)
    of_ranks = run_ranks(2, both_losses_on_ranks)
    for number, config in enumerate(LOSSES):
        first, second = (found[number] for found in of_ranks)
        expected = loss_and_gradients(config, [images, texts.bfloat16().float(), *scalars])
        torch.testing.assert_close(torch.cat([first[0], second[0]]), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([first[1], second[1]]), expected[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close([first[2:], second[2:]], [expected[2:]] * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize(("scale", "bound"), [(14.3, 2.5e-3), (30.0, 4e-3), (50.0, 6e-3)])
def test_texts_in_bf16_cost_some_thousandths_of_the_gradient(config, scale, bound):
    exact = loss_and_gradients(config, features(1024, torch.float64, scale=scale))
    images, texts, *scalars = features(1024, scale=scale)
    rounded = loss_and_gradients(config, [images, texts.bfloat16().float(), *scalars])
    plain = loss_and_gradients(config, [images, texts, *scalars])
    for found, limit in ((rounded, bound), (plain, 1e-5)):
        errors = [(value - true).norm() / true.norm() for value, true in zip(found[:3], exact[:3], strict=True)]
        assert max(errors) < limit


def bytes_by_collective(gather_dtype: str) -> dict[str, int]:
    with fake_world(64) as (_, log):
        loss_and_gradients(LossConfig(gather_dtype=gather_dtype), features(128))
    return {kind: found["bytes"] for kind, found in log.summary().items()}


def test_texts_in_bf16_are_half_the_bytes_there_and_all_of_them_back():
    plain, halved = bytes_by_collective("fp32"), bytes_by_collective("bf16")
    assert halved.pop("all_gather") * 2 == plain.pop("all_gather") == 128 * 64 * 4
    assert halved == plain
    assert plain["reduce_scatter"] == 128 * 64 * 4


def test_one_process_rounds_nothing():
    plain, rounded = (loss_and_gradients(LossConfig(gather_dtype=dtype), features(8)) for dtype in ("fp32", "bf16"))
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0)


@pytest.mark.parametrize("config", LOSSES)
def test_the_graph_holds_neither_texts_nor_their_gradients_while_the_image_tower_computes(config):
    """What a collective holds is not in it: with NCCL the gradients, 4 G E bytes, until they are waited for."""
    all_texts = 64 * 64 * 64 * 4
    images, texts, scale, bias = [value.requires_grad_() for value in features(64)]
    seen = []
    with fake_world(64), LiveMemory() as memory:
        loss = build_loss(config)
        gathered = loss.begin(texts)
        encoded = images * 1
        encoded.register_hook(lambda gradient: seen.append(memory.live))
        loss(encoded, texts, scale, bias, gathered).backward()
    assert seen[0] < all_texts / 4 < all_texts < memory.peak


def test_rows_are_taken_once_and_come_back_once():
    gathered = build_loss(LossConfig()).begin(torch.eye(2, requires_grad=True))
    gathered.take()
    with pytest.raises(AssertionError, match="the rows have been taken"):
        gathered.take()
    with pytest.raises(AssertionError, match="begin was not called"):
        gathered.anchor.backward()


SIZES = [
    *[("ViT-B-32", 896, 1, False), ("ViT-B-32", 896, 32, False), ("ViT-B-32", 896, 64, True)],
    *[("ViT-L-14", 224, 64, False), ("ViT-H-14", 96, 256, False), ("ViT-H-14", 96, 1024, True)],
]


@pytest.mark.parametrize(("model", "rows", "ranks", "first"), SIZES)
def test_texts_come_first_where_they_are_more_than_the_token_embedding(model, rows, ranks, first):
    clip = build_model(load_model_config(model), device="meta")
    with fake_world(ranks):
        assert texts_hide_more_than_they_expose(clip, rows=rows) is first
        clip.requires_grad_(False)  # nothing comes last then
        assert texts_hide_more_than_they_expose(clip, rows=rows) is (ranks > 1)
