"""Trains a tiny model for some steps with one fault in the middle, on as many ranks as the caller has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.distributed.launch import current_runtime
from tests.scaled_loss import ScaledLoss
from tests.tiny_clip import TinyClip, split, tiny_batch, tiny_clip
from training.config import EngineConfig, LossConfig, OptimConfig, ResilienceConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import all_reduce_sum, rank, world_size
from training.distributed.parallelize import parallelize
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.resilience.guard import StepGuard, Vitals
from training.train_step import TrainStep

CPU = torch.device("cpu")
STEPS, FAULTY_STEP, WARMUP = 10, 6, 4


class Outcome(NamedTuple):
    """All that a step could change, and what was seen."""

    model: dict[str, Tensor]
    optimizer: dict[int, Any]
    guard: dict[str, Any]
    scale: float
    vitals: list[Vitals]

    @property
    def all_state(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.guard


def build_guard(guard: str = "on", *, warmup: int = WARMUP) -> StepGuard:
    return StepGuard(
        ResilienceConfig(guard=guard, guard_warmup=warmup),
        device=CPU,
        rank=rank(),
        world_size=world_size(),
        all_reduce_sum=all_reduce_sum,
    )


def build_faulty_step(opt: str, precision: str, guard: StepGuard) -> tuple[TinyClip, TrainStep]:
    model = tiny_clip(batch_norm=True)
    trained = parallelize(model, config=EngineConfig(device="cpu"), runtime=current_runtime())
    row = build_precision(precision, CPU)
    scaler = row.grad_scaler()
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 256.0})  # 65536 overflows in the first steps
    betas = {} if opt.startswith("timm/") else {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}
    step = TrainStep(
        model=trained,
        loss=build_loss(LossConfig(local_loss=True)),
        optimizer=build_optimizer(model, OptimConfig(opt=opt, lr=1e-3, **betas)),
        precision=row,
        scaler=scaler,
        grad_clip_norm=1.0,
        guard=guard,
    )
    return model, step


def run_with_fault(
    fault: str | None, *, guard: str = "on", opt: str = "adamw", precision: str = "fp32", accum_freq: int = 1
) -> Outcome:
    """Ten steps; in the seventh the fault. Without a fault that step is left out: what the others must lead to."""
    judge = build_guard(guard)
    model, step = build_faulty_step(opt, precision, judge)
    vitals = []
    for number in range(STEPS):
        batch = split(tiny_batch(16, seed=number), world_size())[rank()]
        if number != FAULTY_STEP:
            metrics = step(split(batch, accum_freq), lr=1e-3)
        elif fault is not None:
            with FAULTS[fault](model, step):
                metrics = step(split(_break(batch, fault), accum_freq), lr=1e-3)
        else:
            continue
        assert metrics.vitals is not None
        vitals.append(Vitals.from_values(metrics.vitals.tolist()))
    state = copy.deepcopy(step.optimizer.state_dict()["state"])
    return Outcome(copy.deepcopy(model.state_dict()), state, judge.state_dict(), step.scaler.get_scale(), vitals)


def _break(batch: DeviceBatch, fault: str) -> DeviceBatch:
    """One pixel of rank 1."""
    if rank() != world_size() - 1 or fault not in PIXELS:
        return batch
    images = batch.images.clone()
    images[0, 0, 0, 0] = PIXELS[fault]
    return batch._replace(images=images)


PIXELS = {"NaN pixel": float("nan"), "infinite pixel": float("inf")}


@contextmanager
def _nothing(model: TinyClip, step: TrainStep) -> Iterator[None]:
    yield


@contextmanager
def _loss_of_last_rank_is_nan(model: TinyClip, step: TrainStep) -> Iterator[None]:
    real = step.loss
    if rank() == world_size() - 1:
        step.loss = ScaledLoss(real, float("nan"))
    yield
    step.loss = real


def _gradient_hook(factor: float) -> Callable[[TinyClip, TrainStep], Any]:
    @contextmanager
    def before_reduction(model: TinyClip, step: TrainStep) -> Iterator[None]:
        on_last = factor if rank() == world_size() - 1 else 1.0
        handles = [parameter.register_hook(lambda gradient: gradient * on_last) for parameter in model.parameters()]
        yield
        for handle in handles:
            handle.remove()

    return before_reduction


def _after_reduction(factor: float) -> Callable[[TinyClip, TrainStep], Any]:
    @contextmanager
    def after_reduction(model: TinyClip, step: TrainStep) -> Iterator[None]:
        real = step._update.__call__

        def corrupt(**values: Tensor) -> Any:
            if rank() == world_size() - 1:
                for parameter in model.parameters():
                    parameter.grad *= factor  # type: ignore[operator]
            return real(**values)

        update = step._update
        step._update = type("Corrupted", (), {"prepare": update.prepare, "__call__": lambda _, **v: corrupt(**v)})()
        yield
        step._update = update

    return after_reduction


@contextmanager
def _temperature_is_nan(model: TinyClip, step: TrainStep) -> Iterator[None]:
    before = model.logit_scale.detach().clone()
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))
    yield
    with torch.no_grad():
        model.logit_scale.copy_(before)


@contextmanager
def _loss_scale_is_huge(model: TinyClip, step: TrainStep) -> Iterator[None]:
    step.scaler._scale.fill_(1e38)  # type: ignore[union-attr]
    yield


FAULTS: dict[str, Callable[[TinyClip, TrainStep], Any]] = {
    "NaN pixel": _nothing,
    "infinite pixel": _nothing,
    "NaN loss": _loss_of_last_rank_is_nan,
    "gradient x 1e4 before the reduction": _gradient_hook(1e4),
    "gradient x 1e4 after the reduction": _after_reduction(1e4),
    "NaN gradient after the reduction": _after_reduction(float("nan")),
    "NaN temperature": _temperature_is_nan,
    "overflow": _loss_scale_is_huge,
}
BATCH_FAULTS = [name for name in FAULTS if name != "overflow"]
