"""Wrapping from outside: the same numbers, the same parameter names, less memory."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from tests.distributed.launch import current_runtime, run_ranks
from tests.tiny_clip import TinyClip, gradients, tiny_batch, tiny_clip
from training.config import EngineConfig
from training.distributed.parallelize import parallelize, tower_blocks, unwrap
from training.distributed.runtime import Runtime

ONE = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
COMPILED = EngineConfig(device="cpu", torchcompile=True, torchcompile_backend="aot_eager")


def forward_backward(model: TinyClip, config: EngineConfig, *, seed: int = 7) -> list[torch.Tensor]:
    trained = parallelize(model, config=config, runtime=ONE)
    torch.manual_seed(seed)
    output = trained(*tiny_batch(6)[:2])
    (output.image_features @ output.text_features.T * output.logit_scale).exp().mean().log().backward()
    return [*output[:2], *gradients(model).values()]


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(device="cpu", grad_checkpointing=True),
        COMPILED,
        EngineConfig(device="cpu", torchcompile=True, torchcompile_backend="aot_eager", grad_checkpointing=True),
    ],
)
def test_blocks_are_wrapped_without_changing_names_or_numbers(config):
    plain, wrapped = tiny_clip(dropout=0.2), tiny_clip(dropout=0.2)
    names = list(plain.state_dict())
    expected = forward_backward(plain, EngineConfig(device="cpu"))
    found = forward_backward(wrapped, config)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert list(wrapped.state_dict()) == names
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


def activations_kept(config: EngineConfig) -> int:
    """Bytes that the forward pass saves for the backward pass."""
    model = tiny_clip()
    trained = parallelize(model, config=config, runtime=ONE)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained(*tiny_batch(64)[:2])
    return sum(sizes.values())


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    kept = activations_kept(EngineConfig(device="cpu"))
    assert activations_kept(EngineConfig(device="cpu", grad_checkpointing=True)) < 0.7 * kept


def test_a_checkpointed_model_can_be_copied_and_the_copy_uses_its_own_weights():
    model = parallelize(tiny_clip(), config=EngineConfig(device="cpu", grad_checkpointing=True), runtime=ONE)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    block, x = tower_blocks(twin)[0], torch.randn(2, 16)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("config", "flag"), [(EngineConfig(grad_checkpointing=True), "--grad-checkpointing"), (COMPILED, "--torchcompile")]
)
def test_a_model_without_blocks_says_that_a_flag_has_no_effect(config, flag, caplog):
    with caplog.at_level(logging.WARNING):
        parallelize(nn.Linear(2, 2), config=config, runtime=ONE)
    assert f"{flag} has no effect" in caplog.text


def test_synchronized_batch_norm_on_several_cpu_processes_is_refused():
    two = Runtime(rank=0, local_rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="--use-bn-sync with several CPU processes"):
        parallelize(tiny_clip(batch_norm=True), config=EngineConfig(device="cpu", use_bn_sync=True), runtime=two)


def train_batch_norm_on_other_data() -> tuple[list[str], list[torch.Tensor]]:
    """Two steps on data that differs between ranks."""
    runtime = current_runtime()
    model = tiny_clip(batch_norm=True)
    trained = parallelize(model, config=EngineConfig(device="cpu"), runtime=runtime)
    assert unwrap(trained) is model
    seen = []
    for step in range(2):
        trained(*tiny_batch(8, seed=10 * step + runtime.rank)[:2]).image_features.square().sum()
        seen.append(model.visual.bn.running_mean.clone())
    return list(unwrap(trained).state_dict()), seen


def test_running_statistics_start_each_step_from_those_of_rank_zero():
    (names, first), (_, second) = run_ranks(2, train_batch_norm_on_other_data)
    assert names == list(tiny_clip(batch_norm=True).state_dict())
    expected = tiny_clip(batch_norm=True)
    for model_rank, seen in ((0, first), (1, second)):
        model = copy.deepcopy(expected)
        model(*tiny_batch(8, seed=0)[:2])  # step 0 of rank 0: what rank 1 must continue from, too
        model(*tiny_batch(8, seed=10 + model_rank)[:2])
        torch.testing.assert_close(seen[1], model.visual.bn.running_mean)
