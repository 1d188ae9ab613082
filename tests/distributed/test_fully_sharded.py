"""FSDP2 and HSDP on real gloo ranks: everything that DDP does, with a part of the state on each rank."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.factory import build_model
from tests.distributed.launch import RankError, current_runtime, run_ranks
from tests.models.tiny import CONTEXT, CONVNEXT, RESNET, TIMM_VIT, VOCABULARY, tiny_config, tiny_model
from training.config import EngineConfig, LossConfig, OptimConfig, ResilienceConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import all_reduce_sum, gather_objects
from training.distributed.initial_weights import check_no_meta_tensors
from training.distributed.mesh import build_mesh
from training.distributed.parallelize import _whole_parameters, parallelize
from training.distributed.runtime import Runtime
from training.distributed.sharding import (
    ShardGroup,
    _placement,
    local_parameters,
    local_state,
    placements,
    register_sharding,
    shard_group,
)
from training.losses import build_loss
from training.observability.telemetry import Telemetry
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience.guard import StepGuard
from training.resilience.replicas import checksum_names, differing_ranks, differing_tensors, replica_checksum
from training.train_step import StepMetrics, TrainStep

CPU = torch.device("cpu")
STEPS = 2


class Case(NamedTuple):
    """A model, how it is trained, and how far from DDP it may end."""

    engine: dict[str, Any] = {}  # noqa: RUF012
    vision: dict[str, Any] | None = None
    pixels: int = 32
    opt: str = "adamw"
    accum_freq: int = 1
    precision: str = "fp32"
    locked: bool = False
    tolerance: float = 1e-6
    """Of gradients, relative to their norm."""


CHECKPOINTED = {"grad_checkpointing": True}
KEPT = {"fsdp_no_reshard_after_forward": True}
COMPILED = {"torchcompile": True, "torchcompile_backend": "aot_eager"}
TWO_RANKS = {
    "native": Case(),
    "stableadamw": Case(opt="stableadamw", engine=CHECKPOINTED),
    "timm/lion": Case(opt="timm/lion"),
    "accumulated": Case(accum_freq=2, engine=CHECKPOINTED | KEPT, opt="stableadamw"),
    "compiled": Case(engine=COMPILED | CHECKPOINTED, opt="nadamw"),
    "locked": Case(locked=True),
    "patch dropout": Case(vision={"patch_dropout": 0.5}, accum_freq=2),
    "batch norm": Case(vision=RESNET, pixels=32, tolerance=2e-5),  # over 4 rows it amplifies rounding
    "convnext": Case(vision=CONVNEXT, pixels=64, engine=CHECKPOINTED),
    "timm vit": Case(vision=TIMM_VIT, pixels=160, accum_freq=2),
    # Where DDP rounds to bf16, FSDP does, too; only sums over ranks differ.
    "amp_bf16": Case(precision="amp_bf16", tolerance=1e-2),
    "layer scale": Case(vision={"ls_init_value": 0.1}, precision="amp_bf16", tolerance=1e-2),
}
FOUR_RANKS = {
    "all share one copy": Case(),
    "two copies": Case(engine={"fsdp_shard_ranks": 2}, opt="stableadamw"),
    "two copies, accumulated": Case(engine={"fsdp_shard_ranks": 2} | CHECKPOINTED, accum_freq=2),
}


def batch_of(case: Case, *, seed: int) -> DeviceBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, case.pixels, case.pixels, generator=generator)
    return DeviceBatch(images, torch.randint(1, VOCABULARY, (4, CONTEXT), generator=generator))


def build_step(case: Case, *, fsdp: bool, guard: bool = False) -> tuple[nn.Module, TrainStep]:
    model = tiny_model(case.vision).train()
    if case.locked:
        model.visual.requires_grad_(False)
    row = build_precision(case.precision, CPU)
    runtime = current_runtime()
    engine = EngineConfig(device="cpu", fsdp=fsdp, **(case.engine if fsdp else {}))
    wrapped = parallelize(model, config=engine, runtime=runtime, param_dtype=row.autocast_dtype)
    values: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-6}
    optimizer = build_optimizer(model, OptimConfig(opt=case.opt, lr=1e-3, **({} if "/" in case.opt else values)))
    return model, TrainStep(
        model=wrapped,
        loss=build_loss(LossConfig(local_loss=True)),
        optimizer=optimizer,
        precision=row,
        scaler=row.grad_scaler(),
        grad_clip_norm=1.0,
        guard=build_guard() if guard else None,
    )


def build_guard() -> StepGuard:
    runtime = current_runtime()
    return StepGuard(
        ResilienceConfig(),
        device=CPU,
        rank=runtime.rank,
        world_size=runtime.world_size,
        all_reduce_sum=all_reduce_sum,
    )


def train(case: Case, step: TrainStep, *, steps: int = STEPS) -> list[StepMetrics]:
    torch.manual_seed(7 + current_runtime().rank)
    seeds = [
        [100 * number + 10 * current_runtime().rank + micro for micro in range(case.accum_freq)]
        for number in range(steps)
    ]
    return [step([batch_of(case, seed=seed) for seed in micro], lr=1e-3) for micro in seeds]


def rows_of(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    place = placements(model).get(name)
    return whole if place is None else whole[place.start : place.start + place.rows]


def deviations(case: Case) -> dict[str, float]:
    """Largest differences between DDP's run and FSDP's: relative to the norm for gradients, absolute for the rest."""
    (plain, ddp), (sharded, fsdp) = build_step(case, fsdp=False), build_step(case, fsdp=True)
    first = [train(case, step, steps=1)[0] for step in (ddp, fsdp)]
    found = {"loss": abs(first[0].loss - first[1].loss).item()}
    norms = [metrics.grad_norm for metrics in first]
    found["grad_norm"] = abs(norms[1] / norms[0] - 1).item()
    held = local_parameters(sharded)
    # Both were clipped to 1, so that what is left to compare are shares of the norm.
    expected = {name: value for name, value in plain.named_parameters() if value.requires_grad}
    assert {name for name, value in held.items() if value.grad is not None} == expected.keys()
    found["gradients"] = _largest([held[n].grad - rows_of(sharded, n, value.grad) for n, value in expected.items()])
    train(case, ddp), train(case, fsdp)
    state = plain.state_dict()
    assert [*local_state(sharded)] == [*state]
    found["state"] = _largest([value - rows_of(sharded, n, state[n]) for n, value in local_state(sharded).items()])
    return found


def _largest(differences: list[Tensor]) -> float:
    return max(difference.abs().max().item() for difference in differences if difference.numel())


def all_deviations(cases: dict[str, Case]) -> dict[str, dict[str, float]]:
    return {name: deviations(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, dict[str, float]]]:
    return run_ranks(2, all_deviations, TWO_RANKS, timeout_s=240)


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, dict[str, float]]]:
    return run_ranks(4, all_deviations, FOUR_RANKS, timeout_s=240)


def assert_as_ddp(case: Case, found: dict[str, float]) -> None:
    assert found["gradients"] <= case.tolerance
    assert found["grad_norm"] <= 3 * case.tolerance
    assert found["loss"] <= 1e-6
    # AdamW divides tiny gradients by their own size: what is left of rounding is of the size of some steps at worst.
    assert found["state"] <= max(1e-5, 3 * case.tolerance)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_train_as_with_ddp(on_two, name):
    for found in on_two:
        assert_as_ddp(TWO_RANKS[name], found[name])


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_train_as_with_ddp(on_four, name):
    for found in on_four:
        assert_as_ddp(FOUR_RANKS[name], found[name])


def stream_types(vision: dict[str, Any]) -> list[list[torch.dtype]]:
    """Of what each block of the image tower returns: without FSDP, and with it."""
    case, found = Case(vision=vision, precision="amp_bf16"), []
    for fsdp in (False, True):
        model, step = build_step(case, fsdp=fsdp)
        types: list[torch.dtype] = []
        for block in model.image_blocks:
            block.register_forward_hook(lambda module, inputs, output, types=types: types.append(output.dtype))
        train(case, step, steps=1)
        found.append(types[-len(model.image_blocks) :])  # DDP begins with a step that changes nothing
    return found


def test_layer_scale_keeps_the_residual_stream_in_the_precision_it_has_with_ddp():
    for plain, sharded in run_ranks(2, stream_types, {"ls_init_value": 0.1}):
        assert plain == sharded
        assert torch.float32 in plain


def test_vectors_that_a_block_multiplies_with_by_itself_are_whole():
    model = tiny_model(CONVNEXT)
    whole = {name for name, value in model.named_parameters() if value in _whole_parameters(model)}
    scales = {name for name, _ in model.named_parameters() if name.endswith("gamma")}
    assert scales
    assert whole == scales | {"logit_scale"}


def bad_step(opt: str, precision: str, guarded: bool) -> list[str]:
    """What a step changed whose images were not finite on rank 1, which holds the second half of all rows."""
    case = Case(opt=opt, precision=precision, vision=RESNET)
    model, step = build_step(case, fsdp=True, guard=guarded)
    train(case, step)
    before = {name: value.clone() for name, value in everything(model, step).items()}
    batch = batch_of(case, seed=5)
    if current_runtime().rank == 1:
        batch.images[0] = torch.nan
    step([batch], lr=1e-3)
    statistics = () if guarded else ("running_", "num_batches")  # without a guard they are the forward pass's own
    return [
        name
        for name, value in everything(model, step).items()
        if not torch.equal(value, before[name]) and not any(part in name for part in statistics)
    ]


def everything(model: nn.Module, step: TrainStep) -> dict[str, Tensor]:
    state = dict(local_state(model))
    for name, parameter in local_parameters(model).items():
        state |= {f"{name}//{key}": value for key, value in step.optimizer.state[parameter].items()}
    return state


def bad_steps() -> list[list[str]]:
    return [bad_step(opt, "fp32", True) for opt in ("adamw", "stableadamw")] + [bad_step("adamw", "amp", False)]


def test_a_step_that_is_bad_on_one_rank_changes_nothing_on_any():
    """With the guard; and without, where a loss scaler must see what other ranks' rows hold."""
    assert run_ranks(2, bad_steps, timeout_s=120) == [[[], [], []]] * 2


def telemetry(fsdp: bool, shard_ranks: int = 0) -> dict[str, float]:
    case = Case(opt="stableadamw", engine={"fsdp_shard_ranks": shard_ranks})
    model, step = build_step(case, fsdp=fsdp)
    meter = Telemetry(model, step.optimizer, every=1)
    train(case, step)
    return meter.measure(batch_of(case, seed=9))


def telemetries() -> list[dict[str, float]]:
    return [telemetry(False), telemetry(True)]


def test_telemetry_measures_whole_tensors():
    for expected, found in run_ranks(2, telemetries):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def weights_from_rank_zero() -> tuple[bool, bool]:
    """A model that nobody but rank 0 has; its initial state, and whether it trains."""
    expected = tiny_model(TIMM_VIT)
    model = build_model(tiny_config(TIMM_VIT), device="meta")
    source = expected if current_runtime().is_main else None
    parallelize(model, config=EngineConfig(device="cpu", fsdp=True), runtime=current_runtime(), source=source)
    state = expected.state_dict()
    is_equal = all(torch.equal(value, rows_of(model, name, state[name])) for name, value in local_state(model).items())
    output = model.train()(*batch_of(TWO_RANKS["timm vit"], seed=1)[:2])
    return is_equal, bool(torch.isfinite(output.image_features).all())


def test_weights_of_one_rank_reach_all_bit_by_bit():
    assert run_ranks(2, weights_from_rank_zero) == [(True, True)] * 2


def another_model_on_rank_one() -> None:
    layers = 3 if current_runtime().is_main else 2
    model = build_model(tiny_config(text={"layers": layers}), device="meta")
    source = tiny_model() if current_runtime().is_main else None
    parallelize(model, config=EngineConfig(device="cpu", fsdp=True), runtime=current_runtime(), source=source)


def test_ranks_that_built_other_models_are_told_so():
    with pytest.raises(RankError, match=r"rank 1 has built another model than rank 0: .* missing.* here"):
        run_ranks(2, another_model_on_rank_one)


def checksums(shard_ranks: int) -> tuple[ShardGroup | None, list[str], list[int], list[str]]:
    """Of all ranks, after one bit of rank 3's shard has flipped; and of what is compared at all."""
    case = Case(engine={"fsdp_shard_ranks": shard_ranks})
    model, step = build_step(case, fsdp=True)
    train(case, step, steps=1)
    names = checksum_names(model, step.optimizer)
    assert not differing_ranks(gather_objects(replica_checksum(model, step.optimizer).tolist()))
    if current_runtime().rank == 3:
        local_parameters(model)["visual.proj"].view(-1).view(torch.int32).data[0] ^= 1
    sums = gather_objects(replica_checksum(model, step.optimizer).tolist())
    return shard_group(model), names, differing_ranks(sums), differing_tensors(sums, names)


def both_checksums() -> list[Any]:
    return [checksums(2), checksums(0)]


def test_copies_are_compared_where_there_are_several():
    (two_copies, one_copy) = run_ranks(4, both_checksums)[3]
    assert two_copies[0] == ShardGroup(index=1, size=2, replica=1, replicas=2)
    assert two_copies[2:] == ([0, 1, 2, 3], ["visual.proj"])  # two against two: nobody can say who is right
    assert one_copy[0] == ShardGroup(index=3, size=4, replica=0, replicas=1)
    assert {name.partition("//")[0] for name in one_copy[1]} == {"logit_scale"}
    assert one_copy[2:] == ([], [])


def test_a_single_process_trains_as_without_fsdp(caplog):
    caplog.set_level(logging.INFO)
    model, alone = tiny_model(), Runtime(rank=0, local_rank=0, world_size=1, device=CPU)
    assert parallelize(model, config=EngineConfig(device="cpu", fsdp=True), runtime=alone) is model
    assert shard_group(model) is None
    assert placements(model) == {}
    assert [*local_parameters(model).values()] == [*model.parameters()]
    assert "--fsdp has no effect: a single process holds the whole model." in caplog.text


def test_copies_must_fit_the_ranks():
    runtime = Runtime(rank=0, local_rank=0, world_size=12, device=CPU)
    with pytest.raises(ValueError, match=r"--fsdp-shard-ranks 8 does not divide the 12 .* pass one of 2, 3, 4, 6, 12"):
        build_mesh(8, runtime=runtime)


def groups_of_two_meshes() -> list[int]:
    runtime, counts = current_runtime(), list[int]()
    for _ in range(2):
        build_mesh(2, runtime=runtime)
        counts.append(dist.get_pg_count())
    return counts


def test_phases_share_the_groups_of_one_mesh():
    assert run_ranks(4, groups_of_two_meshes)[0] == [3, 3]


def test_there_is_nothing_to_offload_from_a_cpu():
    runtime = Runtime(rank=0, local_rank=0, world_size=2, device=CPU)
    config = EngineConfig(device="cuda", fsdp=True, fsdp_offload_cpu=True)
    with pytest.raises(ValueError, match=r"--fsdp-offload-cpu with --device cpu: .*leave it out"):
        parallelize(tiny_model(), config=config, runtime=runtime)


def test_a_tensor_that_cannot_be_sent_is_found_before_training():
    module = nn.Sequential(nn.Linear(2, 2))
    check_no_meta_tensors(module)
    module[0].table = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match=r"0 \(Linear\) keeps 'table', .* train this model without --fsdp"):
        check_no_meta_tensors(module)


def test_parameters_must_be_cut_as_checkpoints_count_on():
    with pytest.raises(RuntimeError, match="FSDP has sharded no parameter"):
        register_sharding(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"FSDP holds \(3, 4\) of proj \(8, 4\) on rank 1 of 2, not the \(4, 4\)"):
        _placement((8, 4), torch.zeros(3, 4), ShardGroup(1, 2, 0, 1), name="proj")
