"""Garbage collection in step: when it runs, on all ranks alike, and that steps leave nothing to it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import parse_model_config
from models.factory import build_model
from models.packing import pack_texts
from tests.distributed.launch import run_ranks
from tests.gpu.builders import build_step
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import rank, world_size
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.garbage import CollectionInStep
from training.train_step import TrainStep

CPU = torch.device("cpu")
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 4, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
}


@contextmanager
def collections_noted() -> Iterator[list[int]]:
    """The generation of every collection that happens inside, whoever starts it."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def make_garbage() -> None:
    """Far more objects than start a collection by themselves."""
    for _ in range(20_000):
        cycle: list[Any] = []
        cycle.append(cycle)


def test_python_collects_after_every_nth_step_only():
    with CollectionInStep(3) as garbage:
        collected = []
        for step in range(1, 8):
            with collections_noted() as found:
                make_garbage()
                garbage.after_step(step)
            collected.append(found)
    assert collected == [[], [], [2], [], [], [2], []]


class Thing:
    """Says when it is freed."""

    def __init__(self, freed: list[int], number: int) -> None:
        self.free = weakref.finalize(self, freed.append, number)


def test_what_the_first_steps_leave_behind_is_collected_once_and_the_rest_not_looked_at_again():
    freed: list[int] = []
    with CollectionInStep(1000) as garbage:
        before = gc.get_freeze_count()
        for step in range(501, 510):  # of a resumed run
            cycle: list[Any] = [Thing(freed, step)]
            cycle.append(cycle)
            garbage.after_step(step)
            del cycle
        assert freed == [501, 502]
        assert gc.get_freeze_count() > before


def test_zero_leaves_python_alone():
    with CollectionInStep(0) as garbage, collections_noted() as found:
        make_garbage()
        with garbage.automatic():
            make_garbage()
        garbage.after_step(1)
    assert 0 in found
    assert gc.get_freeze_count() == 0


def test_an_evaluation_collects_by_itself_and_leaves_nothing_behind():
    with CollectionInStep(1000) as garbage:
        with collections_noted() as found, garbage.automatic():
            make_garbage()
        assert not gc.isenabled()
    assert found.count(0) > 1
    assert found[-1] == 2


@pytest.mark.parametrize("was_automatic", [True, False])
def test_after_the_loop_everything_is_as_before_also_when_it_fails(was_automatic):
    if not was_automatic:
        gc.disable()

    def fail_in_an_evaluation(garbage: CollectionInStep) -> None:
        assert gc.get_freeze_count() > 0
        with garbage.automatic():
            assert gc.isenabled() == was_automatic
            raise KeyError("the evaluation")

    try:
        with pytest.raises(KeyError), CollectionInStep(5) as garbage:
            fail_in_an_evaluation(garbage)
        assert gc.isenabled() == was_automatic
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def tensors_left_by(accum_freq: int, engine: EngineConfig) -> int:
    """Tensors that only a collection would free after 20 steps without any; those of the first three aside."""
    model = build_model(parse_model_config(TINY, name="tiny"))
    runtime = Runtime(rank=rank(), local_rank=rank(), world_size=world_size(), device=CPU)
    trained = parallelize(model, config=engine, runtime=runtime)
    step = build_step(model, CPU, precision="fp32", clip=1.0, trained=trained)
    texts = torch.tensor([[48, 5, 49, 0], [48, 49, 0, 0]])
    batches = [DeviceBatch(torch.randn(2, 3, 16, 16), pack_texts(texts)) for _ in range(accum_freq)]
    with CollectionInStep(1000):
        for number in range(20):
            if number == 3:
                gc.collect()  # tables that are filled once
            step(batches, lr=1e-3)
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            return sum(isinstance(found, Tensor) for found in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()


PLAIN, CHECKPOINTED = EngineConfig(device="cpu"), EngineConfig(device="cpu", grad_checkpointing=True)
COMPILED = EngineConfig(device="cpu", torchcompile=True, torchcompile_backend="aot_eager")


@pytest.mark.parametrize(
    ("accum_freq", "engine"), [(1, PLAIN), (2, PLAIN), (1, CHECKPOINTED), (2, CHECKPOINTED), (1, COMPILED)]
)
def test_steps_leave_no_tensors_to_the_collector(accum_freq, engine):
    assert tensors_left_by(accum_freq, engine) == 0


def test_a_cycle_that_a_step_makes_would_be_found(monkeypatch):
    forward = TrainStep._forward

    def with_cycle(*arguments: Any) -> Any:
        output = forward(*arguments)
        cycle: list[Any] = [output.image_features.detach().clone()]
        cycle.append(cycle)
        return output

    monkeypatch.setattr(TrainStep, "_forward", with_cycle)
    assert tensors_left_by(1, PLAIN) == 17


def steps_of_collections() -> list[int]:
    """What one rank sees when it makes more garbage than the other."""
    seen = []
    with CollectionInStep(2) as garbage:
        for step in range(1, 6):
            with collections_noted() as found:
                for _ in range(rank()):
                    make_garbage()
                garbage.after_step(step)
            seen += [step] * len(found)
    return seen


def both() -> tuple[list[int], int]:
    return steps_of_collections(), tensors_left_by(1, PLAIN)


def test_all_ranks_collect_after_the_same_steps_which_leave_no_tensors_there_either():
    assert run_ranks(2, both) == [([2, 3, 4], 0), ([2, 3, 4], 0)]
