"""Telemetry: its numbers against plain references, and that measuring changes nothing."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.clip import Clip
from tests.distributed.launch import current_runtime, run_ranks
from tests.models.tiny import CONTEXT, RESNET, TIMM_VIT, VOCABULARY, tiny_model
from training.config import EngineConfig, LossConfig, OptimConfig
from training.data.batch import DeviceBatch
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.distributed.sharding import ShardSums
from training.losses import build_loss
from training.observability import update_statistics
from training.observability.activation_probe import ActivationProbe, max_attention_logit
from training.observability.telemetry import HIGH_SHARE, PATCH_EMBEDDING_RMS, Telemetry, block_names
from training.observability.update_statistics import UpdateMeter
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.train_step import TrainStep

CPU = torch.device("cpu")
PATCHES = "visual.conv1.weight"


def batch_of(size: int = 6, *, seed: int = 1, pixels: int = 32) -> DeviceBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return DeviceBatch(images, torch.randint(1, VOCABULARY, (size, CONTEXT), generator=generator))


def trained(
    model: Clip, *, steps: int = 3, wrapped: nn.Module | None = None, pixels: int = 32, **settings: object
) -> torch.optim.Optimizer:
    """The model after some steps, with the gradients of the last; returns its optimizer."""
    config = OptimConfig(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-6, **settings)
    optimizer = build_optimizer(model.train(), config)
    step = TrainStep(
        model=wrapped or model,
        loss=build_loss(LossConfig(local_loss=True)),
        optimizer=optimizer,
        precision=build_precision("fp32", CPU),
    )
    for number in range(steps):
        step([batch_of(seed=number, pixels=pixels)], lr=1e-3)
    return optimizer


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def reference_rms(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> float:
    """The formula of the module's docstring in fp64."""
    state = optimizer.state[parameter]
    moment = state["exp_avg_sq"].double() / (1 - 0.95 ** float(state["step"]))
    assert parameter.grad is not None
    return float((parameter.grad.double().square() / moment.clamp_min(1e-12)).mean().sqrt())


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"foreach": False}])
def test_update_rms_is_that_of_the_paper_for_every_tensor(implementation, monkeypatch):
    monkeypatch.setitem(update_statistics._CHUNK_ELEMENTS, "cpu", 1000)  # most tensors come in pieces
    model = tiny_model()
    optimizer = trained(model, opt_kwargs=implementation)
    measured = Telemetry(model, optimizer, every=1).measure(batch_of())
    expected = {f"telemetry/update_rms/{n}": reference_rms(p, optimizer) for n, p in model.named_parameters()}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert measured["telemetry/update_rms_max"] == max(measured[name] for name in expected)
    assert measured[PATCH_EMBEDDING_RMS] == measured[f"telemetry/update_rms/{PATCHES}"]


def test_the_smallest_second_moment_is_the_mean_of_a_tensor_without_its_bias():
    model = tiny_model()
    optimizer = trained(model)
    means = [state["exp_avg_sq"].double().mean() / (1 - 0.95**3) for state in optimizer.state.values()]
    measured = Telemetry(model, optimizer, every=1).measure(batch_of())
    assert measured["telemetry/second_moment_min"] == pytest.approx(float(min(means)), rel=1e-4)


def test_a_steady_tensor_has_an_update_rms_of_one_from_the_first_step():
    model = tiny_model()
    measured = Telemetry(model, trained(model, steps=1), every=1).measure(batch_of())
    assert measured[PATCH_EMBEDDING_RMS] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("opt", ["adamw", "stableadamw"])
def test_update_norms_are_what_was_added_to_the_weights(opt):
    model = tiny_model()
    optimizer = trained(model, steps=2, wd=0.0, opt=opt)
    for state in optimizer.state.values():
        state["exp_avg_sq"].mul_(0.01)  # so that there is something for StableAdamW to clip
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    statistics = UpdateMeter(dict(model.named_parameters()), optimizer).measure()
    assert statistics is not None
    assert statistics.update_norm is not None
    for name, norm in zip(statistics.names, statistics.update_norm, strict=True):
        moved = model.get_parameter(name).detach() - before[name]
        assert float(norm) == pytest.approx(float(moved.norm()), rel=1e-3)


def test_gradient_norms_and_update_ratios_are_given_by_block():
    model = tiny_model()
    measured = Telemetry(model, trained(model, wd=0.0), every=1).measure(batch_of())
    block = list(model.image_blocks[1].parameters())
    total = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in block))
    assert measured["telemetry/grad_norm/image/block_01"] == pytest.approx(total, rel=1e-5)
    assert {"image/conv1", "image/proj", "text/token_embedding", "text/block_00", "logit_scale"} <= {
        name.removeprefix("telemetry/update_ratio/") for name in measured
    }


def test_a_second_moment_that_lags_is_seen():
    model = tiny_model()
    optimizer = trained(model)
    optimizer.state[model.get_parameter(PATCHES)]["exp_avg_sq"].mul_(1e-4)
    measured = Telemetry(model, optimizer, every=1).measure(batch_of())
    assert measured[PATCH_EMBEDDING_RMS] > 50
    assert measured[HIGH_SHARE] == pytest.approx(1 / len(list(model.parameters())))


def test_features_and_temperature_are_those_of_the_model_after_the_update():
    model = tiny_model()
    optimizer, batch = trained(model), batch_of()
    measured = Telemetry(model, optimizer, every=1).measure(batch)
    with torch.no_grad():
        features = model.eval().encode_image(batch.images[:2])
    assert measured["telemetry/feature_norm/image"] == pytest.approx(float(features.norm(dim=-1).mean()))
    assert measured["telemetry/logit_scale"] == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_attention_logit_is_that_of_the_written_out_product(causal):
    attention = tiny_model().text_blocks[0].attn
    attention.causal = causal
    tokens = 5 * torch.randn(2, 7, 48)
    query, key, _ = torch.einsum("bld,ed->ble", tokens, attention.in_proj_weight.detach()).chunk(3, dim=-1)
    largest = max(
        float(query[b, i, h * 16 : h * 16 + 16] @ key[b, j, h * 16 : h * 16 + 16]) / 4
        for b in range(2)
        for h in range(3)
        for i in range(7)
        for j in range(i + 1 if causal else 7)
    )
    assert max_attention_logit(attention, tokens).item() == pytest.approx(largest, rel=1e-4)


def test_the_largest_logit_of_a_tower_is_over_its_blocks():
    model, batch = tiny_model(), batch_of(2)
    probe = ActivationProbe(model, autocast=build_precision("fp32", CPU).autocast)
    before = probe.measure(batch.images, batch.texts)
    with torch.no_grad():
        model.image_blocks[2].attn.in_proj_weight.mul_(10)
    after = probe.measure(batch.images, batch.texts)
    assert after["attention_logit_max/image"] > 50 * before["attention_logit_max/image"]
    assert after["attention_logit_max/text"] == before["attention_logit_max/text"]


@pytest.mark.parametrize("vision", [{"patch_dropout": 0.5}, RESNET])
def test_measuring_changes_nothing(vision):
    model = tiny_model(vision)
    optimizer = trained(model, steps=2)
    model.image_blocks[0].eval()  # as a locked tower's norms are
    random = torch.get_rng_state()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    Telemetry(model, optimizer, every=1).measure(batch_of())
    assert_equal((model.state_dict(), optimizer.state_dict()["state"]), before)
    assert_equal([parameter.grad for parameter in model.parameters()], gradients)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in model.modules())


class _Watch(TorchDispatchMode):
    """Largest result of an operation, and how often a value went to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.reads = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.reads += "_local_scalar_dense" in str(function)
        if "foreach" in str(function):
            results = result if isinstance(result, list | tuple) else [result]
            self.largest = max([self.largest, *(one.numel() for one in results if isinstance(one, Tensor))])
        return result


def test_the_pass_over_parameters_reads_nothing_on_the_host_and_needs_little_memory(monkeypatch):
    monkeypatch.setitem(update_statistics._CHUNK_ELEMENTS, "cpu", 500)
    model = tiny_model()
    meter = UpdateMeter(dict(model.named_parameters()), trained(model))
    with _Watch() as watch:
        meter.measure()
    assert watch.reads == 0
    assert 0 < watch.largest <= 500


def test_a_skipped_step_has_no_update():
    model = tiny_model()
    telemetry = Telemetry(model, trained(model), every=1)
    assert PATCH_EMBEDDING_RMS in telemetry.measure(batch_of(), skipped=torch.tensor(0.0))
    measured = telemetry.measure(batch_of(), skipped=torch.tensor(1.0))
    assert "telemetry/logit_scale" in measured
    assert not any("update" in name or "grad_norm" in name for name in measured)


def test_gradients_that_are_not_finite_are_not_reported():
    model = tiny_model()
    telemetry = Telemetry(model, trained(model), every=1)
    model.get_parameter(PATCHES).grad[0, 0, 0, 0] = torch.nan
    measured = telemetry.measure(batch_of())
    assert {name.split("/")[1] for name in measured} == {"logit_scale", "feature_norm", "attention_logit_max"}


def test_before_the_first_step_there_is_no_update_to_measure():
    model = tiny_model()
    telemetry = Telemetry(model, build_optimizer(model, OptimConfig(lr=1.0, beta1=0.9, beta2=0.9, eps=1e-6)), every=1)
    assert "telemetry/feature_norm/text" in telemetry.measure(batch_of())


def test_an_optimizer_without_second_moments_is_named(caplog):
    model = tiny_model()
    caplog.set_level(logging.INFO)
    measured = Telemetry(model, trained(model, opt="timm/lion"), every=1).measure(batch_of())
    assert "telemetry/grad_norm/image/conv1" in measured
    assert PATCH_EMBEDDING_RMS not in measured
    assert "no update RMS and no update norms with Lion" in caplog.text


@pytest.mark.parametrize(("vision", "pixels"), [(TIMM_VIT, 160), (RESNET, 32)])
def test_towers_whose_attention_is_not_ours_are_named(vision, pixels, caplog):
    caplog.set_level(logging.INFO)
    model = tiny_model(vision)
    measured = Telemetry(model, trained(model, steps=1, pixels=pixels), every=1).measure(batch_of(pixels=pixels))
    assert "no attention logits of the image tower" in caplog.text
    assert "telemetry/attention_logit_max/image" not in measured
    assert "telemetry/attention_logit_max/text" in measured
    assert PATCH_EMBEDDING_RMS in measured


@pytest.mark.parametrize("custom_text", [False, True])
def test_blocks_have_the_same_names_in_both_layouts(custom_text):
    names = block_names(tiny_model(custom_text=custom_text))
    assert {"text/block_02", "text/ln_final", "text/text_projection", "image/ln_pre", "image/proj", "logit_scale"} <= {
        *names.values()
    }


def test_compiled_and_checkpointed_blocks_are_measured_without_compiling_again():
    model = tiny_model()
    engine = EngineConfig(device="cpu", grad_checkpointing=True, torchcompile=True, torchcompile_backend="eager")
    wrapped = parallelize(model, config=engine, runtime=Runtime(rank=0, local_rank=0, world_size=1, device=CPU))
    optimizer = trained(model, wrapped=wrapped)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    measured = Telemetry(model, optimizer, every=1).measure(batch_of())
    trained(model, wrapped=wrapped)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames > 0
    assert "telemetry/attention_logit_max/image" in measured


def _measure_as_rank() -> dict[str, float]:
    model = tiny_model()
    wrapped = parallelize(model, config=EngineConfig(device="cpu"), runtime=current_runtime())
    return Telemetry(model, trained(model, wrapped=wrapped), every=1).measure(batch_of(seed=current_runtime().rank))


def test_ranks_agree_on_everything_but_samples():
    first, second = run_ranks(2, _measure_as_rank)
    apart = {name.split("/")[1] for name in first if first[name] != second[name]}
    assert apart == {"feature_norm", "attention_logit_max"}


def test_an_interval_of_zero_is_never_due():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, beta1=0.9, beta2=0.9, eps=1e-6))
    assert [step for step in range(100) if Telemetry(model, optimizer, every=40).is_due(step)] == [0, 40, 80]
    assert not any(Telemetry(model, optimizer, every=0).is_due(step) for step in range(100))


class SumsElsewhere:
    """Stands for the sums of a model whose rows lie in host memory while it computes on a device."""

    device = torch.device("meta")

    def __call__(self, sums: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        return sums

    def size(self, parameter: nn.Parameter) -> int:
        return parameter.numel()


def test_shards_in_host_memory_are_measured_together_with_what_lies_on_the_device():
    parameters = {"scale": nn.Parameter(torch.ones((), device="meta")), "rows": nn.Parameter(torch.ones(3, 2))}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    optimizer.step()
    meter = UpdateMeter(parameters, optimizer, shard_sums=cast(ShardSums, SumsElsewhere()))
    measured = meter.measure()
    assert measured is not None
    assert measured.update_norm.shape == (2,)
