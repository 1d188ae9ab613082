"""Packed texts in training: accumulation, checkpointing, compilation, DDP and sharding see the padded model's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from models.packing import PackedTexts, pack_texts
from tests.distributed.launch import current_runtime, run_ranks
from tests.models.test_packing import captions
from tests.models.tiny import CONTEXT, tiny_images, tiny_model
from tests.test_train_step import build_step
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import rank, world_size
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.observability.metrics import TokenCount
from training.observability.telemetry import Telemetry

ONE = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
LENGTHS = [3, 12, 1, 7, 5, 9, 2, 12]
COMPILED = {"torchcompile": True, "torchcompile_backend": "aot_eager"}


def device_batches(pieces: int, *, packed: bool) -> list[DeviceBatch]:
    """Eight pairs in equal pieces, whose captions have different numbers of tokens."""
    batches = zip(tiny_images(8).chunk(pieces), captions(LENGTHS).chunk(pieces), strict=True)
    return [DeviceBatch(images, pack_texts(texts, multiple=4) if packed else texts) for images, texts in batches]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def train(*, pieces: int = 1, packed: bool = True, steps: int = 1, **engine: Any) -> dict[str, Any]:
    """Loss and gradients of the last of several steps without progress, on this rank's part of the pairs."""
    model = tiny_model({"patch_dropout": engine.pop("patch_dropout", 0.0)}).train()
    runtime = current_runtime() if world_size() > 1 else ONE
    trained = parallelize(model, config=EngineConfig(device="cpu", **engine), runtime=runtime)
    step = build_step(model, trained=trained)
    per_rank = pieces // world_size()
    own = device_batches(pieces, packed=packed)[rank() * per_rank :][:per_rank]
    for _ in range(steps):
        torch.manual_seed(3)
        loss = step(own, lr=0.0).loss
    return {"loss": loss, **gradients_of(model)}


@pytest.mark.parametrize(
    ("pieces", "engine"),
    [
        (1, {}),
        (4, {}),
        (1, {"grad_checkpointing": True}),
        (2, {"grad_checkpointing": True, "patch_dropout": 0.5}),
        (1, {**COMPILED, "grad_checkpointing": True}),
    ],
)
def test_a_step_on_packed_texts_is_that_on_padded_ones(pieces: int, engine: dict[str, Any]) -> None:
    plain = {name: value for name, value in engine.items() if name == "patch_dropout"}
    expected = train(pieces=pieces, packed=False, **plain)
    torch.testing.assert_close(train(pieces=pieces, **engine), expected, atol=1e-5, rtol=1e-5)


def shard_and_train() -> dict[str, Any]:
    """Gradients of the blocks, from a model whose ranks keep a shard each."""
    model = tiny_model(nonscalar_logit_scale=True).train()
    for block in (*model.image_blocks, *model.text_blocks):
        fully_shard(block)
    fully_shard(model)
    images, texts = device_batches(2, packed=True)[rank()][:2]
    (model(images, texts).text_features.sum(dim=0) ** 2).sum().backward()
    return {name: value for name, value in gradients_of(model).items() if value is not None}


def train_as_rank() -> list[dict[str, Any]]:
    plain = train(pieces=2, steps=2)
    accumulated = train(pieces=4, steps=2, ddp_static_graph=True)
    return [plain, accumulated, shard_and_train()]


@pytest.fixture(scope="module")
def of_ranks() -> list[list[dict[str, Any]]]:
    """What each of two ranks found; a pair of processes for all cases."""
    ranks: list[list[dict[str, Any]]] = run_ranks(2, train_as_rank, timeout_s=240)
    return ranks


@pytest.mark.parametrize("case", [0, 1])
def test_ranks_with_different_numbers_of_tokens_get_the_gradient_of_the_whole(of_ranks: Any, case: int) -> None:
    expected = train(packed=False)
    for found in (cases[case] for cases in of_ranks):
        found["loss"] = expected["loss"]  # a rank's own share
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sharded_blocks_take_packed_texts(of_ranks: Any) -> None:
    model = tiny_model(nonscalar_logit_scale=True).train()
    for batch in device_batches(2, packed=False):
        # FSDP averages over ranks.
        ((model(*batch[:2]).text_features.sum(dim=0) ** 2).sum() / 2).backward()
    expected = gradients_of(model)
    for *_, found in of_ranks:
        assert sum("transformer.resblocks" in name for name in found) >= 36
        torch.testing.assert_close(found, {name: expected[name] for name in found}, atol=1e-5, rtol=1e-5)


def test_telemetry_measures_the_first_captions_of_a_packed_batch() -> None:
    model, found = tiny_model().train(), []
    for packed in (True, False):
        (batch,) = device_batches(1, packed=packed)
        step = build_step(model)
        step([batch], lr=0.0)
        measured = Telemetry(model, step.optimizer, every=1).measure(batch)
        found.append({name: value for name, value in measured.items() if "feature_norm" in name})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(found[0]) == 2


def test_tokens_are_counted_against_the_padded_batch() -> None:
    count = TokenCount()
    assert count.read() == {}
    texts = captions([3, 5])
    packed = pack_texts(texts, multiple=4)
    assert isinstance(packed, PackedTexts)
    count.add(packed)
    assert count.read() == pytest.approx({"text_tokens_pct": 100 * 12 / (2 * CONTEXT), "text_tokens_per_sample": 6.0})
    count.add(texts)
    assert count.read()["text_tokens_pct"] == pytest.approx(100 * (12 + 24) / 48)
