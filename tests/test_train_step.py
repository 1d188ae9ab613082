"""The step: what one update does, and that micro-batches and ranks change nothing about it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.launch import current_runtime, run_ranks
from tests.tiny_clip import TinyClip, gradients, split, tiny_batch, tiny_clip
from training.config import EngineConfig, LossConfig, OptimConfig, ResilienceConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import all_reduce_sum, rank, world_size
from training.distributed.parallelize import parallelize
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience.delayed import DelayedVitals
from training.resilience.guard import VITALS, StepGuard
from training.train_step import StepMetrics, TrainStep

CPU = torch.device("cpu")
GLOBAL_BATCH = 16


def build_step(
    model: nn.Module, *, trained: nn.Module | None = None, precision: str = "fp32", **options: Any
) -> TrainStep:
    """A step with plain SGD, whose update is the gradient: nothing hides a wrong one."""
    row = build_precision(precision, CPU)
    loss = build_loss(LossConfig(local_loss=True, siglip=options.pop("siglip", False)))
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters())
    scaler = row.grad_scaler()
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})  # 65536 overflows in the first steps
    return TrainStep(model=trained or model, loss=loss, optimizer=optimizer, precision=row, scaler=scaler, **options)


def run_step(
    model: TinyClip, batch: DeviceBatch, *, accum_freq: int = 1, steps: int = 1, engine: Any = None, **options: Any
) -> tuple[StepMetrics, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's part of the batch in ``accum_freq`` pieces; the last metrics, the gradients, the new state."""
    engine = engine or EngineConfig(device="cpu")
    wrapped = parallelize(model, config=engine, runtime=current_runtime()) if world_size() > 1 else model
    step = build_step(model, trained=wrapped, **options)
    own = split(batch, world_size())[rank()]
    for _ in range(steps):
        metrics = step(split(own, accum_freq), lr=0.1)
    return metrics, gradients(model), {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Values above 1 are compared relative to them."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("accum_freq", [2, 4])
def test_micro_batches_give_the_gradients_of_the_big_batch(siglip, accum_freq):
    batch = tiny_batch(GLOBAL_BATCH)
    plain = run_step(tiny_clip(bias=siglip), batch, siglip=siglip)
    pieces = run_step(tiny_clip(bias=siglip), batch, siglip=siglip, accum_freq=accum_freq)
    assert_close(pieces, plain)


def one_graph_over_all_micro_batches(model: TinyClip, batch: DeviceBatch, pieces: int) -> Tensor:
    """What accumulation must equal where it cannot equal the big batch: dropout and BatchNorm see micro-batches."""
    outputs = [model(piece.images, piece.texts) for piece in split(batch, pieces)]
    features = [torch.cat([output[index] for output in outputs]) for index in (0, 1)]
    loss = build_loss(LossConfig())(*features, *outputs[0][2:])
    loss.backward()
    return loss.detach()


def test_dropout_masks_are_replayed_and_batch_norm_counts_each_batch_once():
    batch = tiny_batch(GLOBAL_BATCH)
    batch = batch._replace(images=batch.images.double())  # BatchNorm over 4 rows amplifies fp32's rounding
    expected = tiny_clip(dropout=0.3, batch_norm=True).double()
    torch.manual_seed(5)
    loss = one_graph_over_all_micro_batches(expected, batch, 4)
    found = tiny_clip(dropout=0.3, batch_norm=True).double()
    torch.manual_seed(5)
    metrics, grads, state = run_step(found, batch, accum_freq=4)
    assert_close(metrics.loss, loss, 1e-12)
    assert_close(grads, gradients(expected), 1e-12)
    for name, buffer in expected.named_buffers():
        assert_close(state[name], buffer, 1e-12)
    assert state["visual.bn.num_batches_tracked"] == 4


def test_random_numbers_after_an_accumulated_step_are_those_of_one_forward_pass_per_micro_batch():
    batch, model = tiny_batch(GLOBAL_BATCH), tiny_clip(dropout=0.3)
    torch.manual_seed(5)
    for piece in split(batch, 2):
        model(piece.images, piece.texts)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run_step(model, batch, accum_freq=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_accumulation_under_autocast_gives_the_same_step(precision):
    batch = tiny_batch(GLOBAL_BATCH)
    plain = run_step(tiny_clip(), batch, precision=precision)
    pieces = run_step(tiny_clip(), batch, precision=precision, accum_freq=4)
    # Sums over the batch are rounded to half precision in another grouping: 3 digits for fp16, 2 for bf16.
    tolerance = 2e-3 if precision == "amp" else 1.6e-2
    assert all(torch.isfinite(grad).all() for grad in pieces[1].values())
    assert_close(pieces[0].loss, plain[0].loss, 1e-6)
    scale = max(grad.abs().max() for grad in plain[1].values())
    for name, grad in plain[1].items():
        assert (pieces[1][name] - grad).abs().max() <= tolerance * scale, name


def test_a_locked_tower_is_left_alone_and_the_other_learns():
    batch, model = tiny_batch(GLOBAL_BATCH), tiny_clip()
    model.visual.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build_step(model)(split(batch, 2), lr=0.1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("visual.") for name in changed)


RANK_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accum_freq": 2},
    "static graph": {"accum_freq": 2, "engine": EngineConfig(device="cpu", ddp_static_graph=True)},
    "static graph, plain": {"engine": EngineConfig(device="cpu", ddp_static_graph=True)},
    "checkpointed": {"accum_freq": 2, "engine": EngineConfig(device="cpu", grad_checkpointing=True)},
    "checkpointed static graph": {
        "accum_freq": 2,
        "engine": EngineConfig(device="cpu", grad_checkpointing=True, ddp_static_graph=True),
    },
    "siglip": {"accum_freq": 4, "siglip": True},
    "clipped": {"accum_freq": 2, "grad_clip_norm": 0.5},
    "scaled fp16 gradients": {"accum_freq": 2, "precision": "amp"},
}


def several_steps_of_all_cases() -> list[Any]:
    """Three steps each: DDP with a static graph takes another path from the second step on."""
    batch = tiny_batch(GLOBAL_BATCH)
    return [
        run_step(tiny_clip(bias=options.get("siglip", False)), batch, steps=3, **options)
        for options in RANK_CASES.values()
    ]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, several_steps_of_all_cases)


@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_train_like_one_process_on_the_joined_batch(case, two_ranks):
    options = {key: value for key, value in RANK_CASES[case].items() if key not in ("accum_freq", "engine")}
    plain = run_step(tiny_clip(bias="siglip" in options), tiny_batch(GLOBAL_BATCH), steps=3, **options)
    tolerance = 2e-3 if "precision" in options else 1e-6
    found = [results[list(RANK_CASES).index(case)] for results in two_ranks]
    assert_close(sum(metrics.loss for metrics, _, _ in found) / 2, plain[0].loss, tolerance)
    for metrics, grads, state in found:
        assert_close(metrics.grad_norm, plain[0].grad_norm, tolerance)
        assert_close(grads, plain[1], tolerance)
        assert_close(state, plain[2], tolerance)


def first_step_with_batch_norm() -> list[dict[str, Tensor]]:
    """Statistics of this rank after one step, plain and of two micro-batches."""
    own = split(tiny_batch(GLOBAL_BATCH), 2)[rank()]
    found = []
    for pieces in (1, 2):
        model = tiny_clip(batch_norm=True)
        trained = parallelize(model, config=EngineConfig(device="cpu", accum_freq=pieces), runtime=current_runtime())
        build_step(model, trained=trained)(split(own, pieces), lr=0.1)
        found.append(dict(model.named_buffers()))
    return found


def test_a_process_s_first_step_counts_each_batch_once():
    """Although the first micro-batch goes through the model once more."""
    of_ranks = split(tiny_batch(GLOBAL_BATCH), 2)
    for place, cases in enumerate(run_ranks(2, first_step_with_batch_norm)):
        for pieces, found in zip((1, 2), cases, strict=True):
            expected = tiny_clip(batch_norm=True)
            # DDP sends rank 0's statistics before the last micro-batch.
            for piece in (*split(of_ranks[0], pieces)[:-1], split(of_ranks[place], pieces)[-1]):
                expected(piece.images, piece.texts)
            assert found["visual.bn.num_batches_tracked"] == pieces
            assert_close(found, dict(expected.named_buffers()))


def dropout_on_two_ranks(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the step, and of one graph over the micro-batches of both ranks, averaged by hand."""
    batch = tiny_batch(GLOBAL_BATCH)
    torch.manual_seed(seed + rank())
    state = torch.get_rng_state()
    model = tiny_clip(dropout=0.3)
    torch.set_rng_state(state)
    _, found, _ = run_step(model, batch, accum_freq=2)
    expected = tiny_clip(dropout=0.3)
    torch.set_rng_state(state)
    one_graph_over_all_micro_batches(expected, split(batch, world_size())[rank()], 2)
    return found, gradients(expected)


def test_dropout_differs_between_ranks_and_is_replayed_on_each():
    (found, first), (found_there, second) = run_ranks(2, dropout_on_two_ranks, 9)
    assert_close(found, found_there)
    assert_close(found, {name: (first[name] + second[name]) / 2 for name in first})


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported():
    batch = tiny_batch(GLOBAL_BATCH)
    free, plain, _ = run_step(tiny_clip(), batch)
    clipped, grads, _ = run_step(tiny_clip(), batch, grad_clip_norm=0.25)
    norm = torch.stack([grad.norm() for grad in plain.values()]).norm()
    assert norm > 0.25
    assert_close(free.grad_norm, norm)
    assert_close(clipped.grad_norm, norm)
    assert torch.stack([grad.norm() for grad in grads.values()]).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_every_group_gets_the_step_s_learning_rate_times_its_scale():
    model = tiny_clip()
    groups = [{"params": [*model.visual.parameters()], "lr_scale": 0.5}, {"params": [*model.text.parameters()]}]
    step = build_step(model, optimizer=torch.optim.SGD(groups))
    step([tiny_batch(4)], lr=0.2)
    assert [group["lr"] for group in step.optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-3.0, 0.0)])
def test_the_logit_scale_is_clamped_after_the_step(start, end):
    model = tiny_clip()
    with torch.no_grad():
        model.logit_scale.fill_(start)
    metrics = build_step(model)([tiny_batch(4)], lr=1e-6)
    assert model.logit_scale.item() == pytest.approx(end)
    assert metrics.logit_scale.item() == pytest.approx(math.exp(start))


def test_an_overflow_skips_the_step_and_lowers_the_loss_scale():
    model = tiny_clip()
    step = build_step(model, precision="amp")
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    before = [parameter.clone() for parameter in model.parameters()]
    metrics = step([tiny_batch(8)], lr=0.1)
    assert not torch.isfinite(metrics.grad_norm)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert step.scaler.get_scale() == pytest.approx(5e37)


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_training_lowers_the_loss(accum_freq):
    model, batch = tiny_clip(), tiny_batch(GLOBAL_BATCH)
    step = build_step(model, optimizer=torch.optim.AdamW(model.parameters()))
    losses = [step(split(batch, accum_freq), lr=0.01).loss.item() for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


def build_guard(device: torch.device = CPU, *, guard: str = "on") -> StepGuard:
    config = ResilienceConfig(guard=guard, guard_warmup=2)
    return StepGuard(config, device=device, rank=0, world_size=1, all_reduce_sum=all_reduce_sum)


@pytest.mark.parametrize("guard", ["on", "off"])
@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_guard_changes_nothing_about_good_steps(guard, precision):
    results = []
    for judge in (None, build_guard(guard=guard)):
        model = tiny_clip(batch_norm=True)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6))
        step = build_step(model, precision=precision, optimizer=optimizer, grad_clip_norm=1.0, guard=judge)
        metrics = [step([tiny_batch(8, seed=number)], lr=1e-3) for number in range(5)]
        results.append((model.state_dict(), [entry[:3] for entry in metrics]))
        assert all((entry.vitals is None) == (judge is None) for entry in metrics)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: a number read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def host_reads_per_step(optimizer: str, **options: Any) -> float:
    model = tiny_clip(batch_norm=True)
    betas = {} if optimizer.startswith("timm/") else {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
    built = build_optimizer(model, OptimConfig(opt=optimizer, lr=1e-3, **betas))
    step = build_step(model, optimizer=built, guard=build_guard(), grad_clip_norm=1.0, **options)
    delayed, accum_freq = DelayedVitals(), 2 if options.get("precision") == "amp_bf16" else 1
    with HostReads() as reads:
        for number in range(4):
            metrics = step(split(tiny_batch(8, seed=number), accum_freq), lr=1e-3)
            assert metrics.vitals is not None
            delayed.push(number, metrics.vitals)
            assert len(delayed.ready()) == (number >= 2)
    return reads.count / 4


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "stableadamw"])
def test_a_guarded_step_is_never_read_by_the_host(optimizer, precision):
    assert host_reads_per_step(optimizer, precision=precision) == 0


def test_other_optimizers_cost_one_read_of_the_verdict():
    assert host_reads_per_step("timm/lion") == 1


def test_a_skipped_step_is_told_by_its_vitals_and_the_next_one_counts():
    model = tiny_clip()
    step = build_step(model, optimizer=torch.optim.AdamW(model.parameters(), fused=True), guard=build_guard())
    before = [parameter.clone() for parameter in model.parameters()]
    batch = tiny_batch(8)
    metrics = step([batch._replace(images=batch.images * math.nan)], lr=0.1)
    assert metrics.vitals is not None
    assert metrics.vitals[VITALS.index("bad")] == 1
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    step([batch], lr=0.1)
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


CUDA = torch.device("cuda")


def on_cuda(batch: DeviceBatch) -> DeviceBatch:
    return DeviceBatch(batch.images.to(CUDA), batch.texts.to(CUDA))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "stableadamw"])
@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize("precision", ["amp_bf16", "amp", "fp32"])
def test_a_step_on_the_gpu_never_waits_for_it(precision, accum_freq, optimizer):
    model = tiny_clip(dropout=0.1).to(CUDA)
    row = build_precision(precision, CUDA)
    step = TrainStep(
        model=model,
        loss=build_loss(LossConfig()),
        optimizer=build_optimizer(model, OptimConfig(opt=optimizer, lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6)),
        precision=row,
        scaler=row.grad_scaler(),
        grad_clip_norm=1.0,
        guard=build_guard(CUDA),
    )
    delayed = DelayedVitals()
    pieces = split(on_cuda(tiny_batch(GLOBAL_BATCH)), accum_freq)
    step(pieces, lr=1e-3)  # the first step creates states, and the scaler its scale
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = step(pieces, lr=1e-3)
        assert metrics.vitals is not None
        delayed.push(1, metrics.vitals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics.loss)
    assert delayed.drain()[0][1].loss == pytest.approx(metrics.loss.item())


@pytest.mark.gpu
def test_dropout_masks_are_replayed_on_the_gpu():
    batch = on_cuda(tiny_batch(GLOBAL_BATCH))
    batch = batch._replace(images=batch.images.double())
    found, expected = (tiny_clip(dropout=0.3, batch_norm=True).double().to(CUDA) for _ in range(2))
    torch.manual_seed(5)
    one_graph_over_all_micro_batches(expected, batch, 4)
    torch.manual_seed(5)
    _, grads, _ = run_step(found, batch, accum_freq=4)
    assert_close(grads, gradients(expected), 1e-12)
