"""StableAdamW is the paper's algorithm, AdamW where updates are small, and obeys found_inf as fused AdamW does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_clip import TinyClip, tiny_batch, tiny_clip
from training.config import OptimConfig
from training.optim.optimizer import build_optimizer, set_beta2
from training.optim.stable_adamw import StableAdamW

SETTINGS = OptimConfig(opt="stableadamw", lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6, wd=0.2)
SHAPES = [(), (5,), (3, 4), (2, 3, 2, 2)]


def reference(steps: list[list[Tensor]], start: list[Tensor], *, lr: float, beta1: float, beta2: float, eps: float):
    """Algorithm 2 of arXiv 2304.13013 in fp64, with its debiasing by decayed betas; returns parameters and last RMS."""
    parameters = [tensor.double() for tensor in start]
    v, u = ([torch.zeros_like(tensor) for tensor in parameters] for _ in range(2))
    all_rms = []
    for t, gradients in enumerate(steps, start=1):
        beta1_t, beta2_t = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (beta1, beta2))
        for index, gradient in enumerate(tensor.double() for tensor in gradients):
            v[index] = beta1_t * v[index] + (1 - beta1_t) * gradient
            u[index] = beta2_t * u[index] + (1 - beta2_t) * gradient**2
            rms = (gradient**2 / u[index].clamp_min(eps**2)).mean().sqrt()
            rate = lr / max(1.0, rms.item())
            change = rate * 0.2 * parameters[index] + rate * v[index] / (u[index].sqrt() + eps)
            parameters[index] = parameters[index] - change
            all_rms.append(rms)
    return parameters, all_rms[-len(start) :]


def random_tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def run(optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters_like(start: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in start]


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_updates_are_those_of_the_paper(monkeypatch, chunk):
    monkeypatch.setattr("training.optim.stable_adamw._CHUNK_ELEMENTS", chunk)
    # Gradients that suddenly grow and shrink: the RMS is far above 1 in the fourth step and the eighth.
    steps = [random_tensors(seed, scale) for seed, scale in enumerate([1, 1, 1e-3, 5, 1, 1, 1e-4, 10, 1, 0.1])]
    start = random_tensors(99)
    optimizer = StableAdamW(parameters_like(start), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    for count in range(1, len(steps) + 1):
        found = run(optimizer, steps[count - 1 : count])
        expected, rms = reference(steps[:count], start, lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6)
        torch.testing.assert_close([tensor.double() for tensor in found], expected, rtol=1e-5, atol=1e-6)
        measured = [value.double() for value in optimizer.update_rms.values()]
        torch.testing.assert_close(measured, rms, rtol=1e-4, atol=1e-5)
    assert max(rms) < 1


def train(model: TinyClip, optimizer: torch.optim.Optimizer, *, steps: int, found_inf: float | None = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        output = model(*tiny_batch(8, seed=step)[:2])
        (output.logit_scale * output.image_features @ output.text_features.T).logsumexp((0, 1)).backward()
        if found_inf is not None:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), None  # type: ignore[attr-defined]
        optimizer.step()


def test_it_is_adamw_where_no_update_is_large():
    # Gradients of one size: the second moment follows them, and no RMS exceeds 1.
    steps = [[tensor.sign() for tensor in random_tensors(seed)] for seed in range(20)]
    start = random_tensors(99)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    stable = StableAdamW(parameters_like(start), **settings)
    plain = torch.optim.AdamW(parameters_like(start), fused=True, **settings)
    for gradients in steps:
        torch.testing.assert_close(run(stable, [gradients]), run(plain, [gradients]), rtol=1e-6, atol=1e-6)
        assert max(stable.update_rms.values()) <= 1 + 1e-6


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("opt", ["adamw", "stableadamw"])
@pytest.mark.parametrize("good_steps_before", [0, 3])
def test_a_step_with_found_inf_changes_nothing_whatever_the_gradients_are(opt, good_steps_before):
    model = tiny_clip()
    optimizer = build_optimizer(model, OptimConfig(**{**vars(SETTINGS), "opt": opt}))
    train(model, optimizer, steps=good_steps_before)
    weights, state = state_of(model, optimizer)
    for value in (float("nan"), float("inf"), 1e30):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
        optimizer.step()
    found_weights, found_state = state_of(model, optimizer)
    torch.testing.assert_close(found_weights, weights, rtol=0, atol=0)
    if good_steps_before:
        torch.testing.assert_close(found_state, state, rtol=0, atol=0)
    assert all(entry["step"] == good_steps_before for entry in found_state.values())
    assert all(not entry[name].isnan().any() for entry in found_state.values() for name in ("exp_avg", "exp_avg_sq"))


_VIEWS = (torch.ops.aten.view, torch.ops.aten.detach, torch.ops.aten.unbind)


class Calls(TorchDispatchMode):
    """Counts the operations that the host asks for; views are not on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket not in _VIEWS
        return function(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_the_number_of_tensors():
    counts = []
    for tensors in (3, 300):
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(tensors)]
        optimizer = StableAdamW(parameters, lr=0.1)
        run(optimizer, [[torch.ones(4)] * tensors])
        optimizer.found_inf = torch.tensor(0.0)
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    assert counts[0] == counts[1] < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_a_skipped_step_are_zero_afterwards_and_others_keep_their_bits(dtype):
    values = torch.tensor([float("nan"), float("-inf"), -0.0, -1.5, 3e-5], dtype=dtype)
    for found_inf in (0.0, 1.0):
        parameter = nn.Parameter(torch.ones(2, 5, dtype=dtype))
        parameter.grad = torch.stack([values, values]).T.contiguous().T  # not in the order of memory
        optimizer = StableAdamW([parameter])
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        expected = torch.zeros_like(values) if found_inf else values
        torch.testing.assert_close(parameter.grad[1], expected, rtol=0, atol=0, equal_nan=True)


def test_tensors_with_counters_of_their_own_have_their_own_bias_correction():
    """One that was frozen at first; its first update is as large as a first update is."""
    late, early = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = StableAdamW([early, late], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        early.grad = torch.ones(4)
        optimizer.step()
    late.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((4,), -0.1), rtol=1e-5, atol=0)
    assert [optimizer.state[parameter]["step"].item() for parameter in (early, late)] == [6, 1]


def test_found_inf_of_zero_is_an_ordinary_step():
    model, twin = tiny_clip(), tiny_clip()
    train(model, build_optimizer(model, SETTINGS), steps=3)
    train(twin, build_optimizer(twin, SETTINGS), steps=3, found_inf=0.0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


def test_gradients_are_divided_by_their_scale():
    model, twin = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    scaled, plain = StableAdamW(model), StableAdamW(twin)
    scaled.grad_scale = torch.tensor(8.0)
    torch.testing.assert_close(run(scaled, [[torch.full((3,), 4.0)]]), run(plain, [[torch.full((3,), 0.5)]]))


def test_half_precision_parameters_are_trained_beside_others():
    model = tiny_clip()
    model.visual.blocks.to(torch.bfloat16)
    optimizer = build_optimizer(model, SETTINGS)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), None
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize(("source", "target"), [("adamw", "stableadamw"), ("stableadamw", "adamw")])
@pytest.mark.parametrize("fused", [True, False])
def test_state_of_either_loads_in_the_other(source, target, fused):
    model = tiny_clip()
    extra = {} if source == "stableadamw" else {"opt_kwargs": {"fused": fused}}
    writer = build_optimizer(model, OptimConfig(**{**vars(SETTINGS), "opt": source, **extra}))
    train(model, writer, steps=2)
    twin = copy.deepcopy(model)
    reader = build_optimizer(twin, OptimConfig(**{**vars(SETTINGS), "opt": target}))
    groups = reader.state_dict()["param_groups"]
    reader.load_state_dict({"state": writer.state_dict()["state"], "param_groups": groups})
    torch.testing.assert_close(reader.state_dict()["state"], writer.state_dict()["state"], rtol=0, atol=0)
    train(twin, reader, steps=1, found_inf=0.0)
    assert {float(state["step"]) for state in reader.state.values()} == {3.0}


def test_groups_are_adamws():
    stable = build_optimizer(tiny_clip(), SETTINGS)
    plain = build_optimizer(tiny_clip(), OptimConfig(**{**vars(SETTINGS), "opt": "adamw"}))
    for found, expected in zip(stable.param_groups, plain.param_groups, strict=True):
        assert found["param_names"] == expected["param_names"]
        assert found["weight_decay"] == expected["weight_decay"]


def test_a_closure_is_called_with_gradients_enabled():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([parameter], lr=0.1)

    def loss() -> float:
        value = parameter.square().sum()
        value.backward()
        return value.item()

    assert optimizer.step(loss) == 2.0
    assert parameter.max() < 1


@pytest.mark.parametrize("opt", ["adamw", "stableadamw", "nadamw"])
def test_a_change_of_beta2_leaves_the_next_update_the_size_it_had(opt):
    """Without it, going from 0.999 to 0.95 after 10 steps would make the update 6 times too large."""
    updates = {}
    for beta2 in (None, 0.95):
        parameter = nn.Linear(4, 4, bias=False)
        nn.init.constant_(parameter.weight, 1.0)
        config = OptimConfig(opt=opt, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, wd=0.0)
        optimizer = build_optimizer(parameter, config)
        run(optimizer, [[torch.ones(4, 4)]] * 10)
        if beta2 is not None:
            set_beta2(optimizer, beta2)
            assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
        before = parameter.weight.detach().clone()
        updates[beta2] = before - run(optimizer, [[torch.ones(4, 4)]])[0]
    torch.testing.assert_close(updates[0.95], updates[None], rtol=1e-3, atol=1e-8)


def test_beta2_of_an_optimizer_without_one_is_left_alone():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    set_beta2(optimizer, 0.95)
    assert "betas" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr -1.0 and weight decay 0.2: neither may be negative"),
        ({"weight_decay": -0.1}, "weight decay -0.1: neither may be negative"),
        ({"betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\): give values from 0 to below 1 \(--beta1, --beta2\)"),
        ({"eps": 0.0}, "eps 0.0: it divides by it, so give a positive --eps"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StableAdamW([nn.Parameter(torch.ones(1))], **settings)
