"""A run in miniature whose state can be saved: a real model, optimizer and loader, without any data."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from models.config import PreprocessConfig
from models.factory import create_model
from tests.factories import character_tokens
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.config import CheckpointConfig, DataConfig, EngineConfig, ImageConfig, OptimConfig
from training.data.build import build_train_loader
from training.distributed.collectives import gather_objects
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.distributed.sharding import local_parameters, local_state, placements, shard_group
from training.optim.optimizer import build_optimizer
from training.state import TrainState

ALONE = Runtime(0, 0, 1, torch.device("cpu"))
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@cache
def _model_path(width: int, layers: int) -> str:
    text = {**MODEL["text_cfg"], "width": width, "layers": layers}  # type: ignore[dict-item]
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump({**MODEL, "text_cfg": text}, file)
    return file.name


def tiny_parts(
    *, runtime: Runtime = ALONE, seed: int = 0, width: int = 32, layers: int = 1, shard_ranks: int | None = None
) -> RunParts:
    """The parts of a run before its first step.

    Args:
        shard_ranks: ranks that share one copy of the state, 0 for all of them; None: each has its own.
    """
    torch.manual_seed(seed)
    model = create_model(_model_path(width, layers)).model
    if shard_ranks is not None:
        parallelize(model, config=EngineConfig(device="cpu", fsdp=True, fsdp_shard_ranks=shard_ranks), runtime=runtime)
    loader = build_train_loader(
        DataConfig(dataset_type="synthetic", train_num_samples=64, batch_size=4, workers=0),
        ImageConfig(),
        preprocess=PreprocessConfig(size=(16, 16)),
        tokenizer=character_tokens,  # type: ignore[arg-type]
        rank=runtime.rank,
        world_size=runtime.world_size,
        accum_freq=1,
        seed=0,
    )
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6))
    return RunParts(model, optimizer, None, loader, TrainState())


def train_steps(parts: RunParts, count: int = 1) -> None:
    """Updates with gradients that depend on the step only: the same on every rank."""
    for _ in range(count):
        generator = torch.Generator().manual_seed(parts.state.step)
        places = placements(parts.model)
        for name, parameter in local_parameters(parts.model).items():
            place = places.get(name)
            shape = parameter.shape if place is None else place.full_shape
            gradient = torch.randn(shape, generator=generator)
            parameter.grad = gradient if place is None else gradient[place.start :][: place.rows].clone()
            parameter.grad = parameter.grad.reshape(parameter.shape)
        parts.optimizer.step()
        parts.state.step += 1
        parts.state.samples_seen += 4


def build_saver(root: Path, parts: RunParts, *, runtime: Runtime = ALONE, **settings: object) -> Saver:
    """A saver with the given flags; ``checkpointer`` and ``epoch_files`` among them are arguments of its own."""
    checkpointer = settings.pop("checkpointer", None) or Checkpointer(root)
    assert isinstance(checkpointer, Checkpointer)
    epoch_files = bool(settings.pop("epoch_files", True))
    return Saver(
        CheckpointConfig(**settings),  # type: ignore[arg-type]
        checkpointer=checkpointer,
        parts=parts,
        runtime=runtime,
        run_config={"lr": 1e-2},
        name="run",
        epochs=3,
        epoch_files=epoch_files,
    )


def state_of(parts: RunParts) -> dict[str, Tensor]:
    """A copy of weights and optimizer state by name; with FSDP of this rank's rows."""
    names = {parameter: name for name, parameter in local_parameters(parts.model).items()}
    state = {name: tensor.clone() for name, tensor in local_state(parts.model).items()}
    for parameter, values in parts.optimizer.state.items():
        state |= {f"{names[parameter]}//{key}": value.clone() for key, value in values.items()}
    return state


def whole_state_of(parts: RunParts) -> dict[str, Tensor]:
    """The same with all rows, of rank 0's copy. Collective: all ranks."""
    group, places = shard_group(parts.model), placements(parts.model)
    ranks = gather_objects((group, state_of(parts)))
    whole = ranks[0][1]
    for name, tensor in whole.items():
        place = places.get(name.partition("//")[0])
        if place is not None and tensor.ndim > 0:
            shards = [state[name] for other, state in ranks if other is not None and other.replica == 0]
            whole[name] = torch.cat([shard.reshape(-1, *place.full_shape[1:]) for shard in shards])
    return whole


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
