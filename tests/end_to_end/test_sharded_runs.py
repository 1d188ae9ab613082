"""A run goes on sharded from what it saved whole, and whole from what it saved sharded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import Outcome, run_ranks_to_end
from tests.factories import write_shards
from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint, read_step_checkpoint
from training.checkpoint.manifest import read_manifest

Run = Callable[[Sequence[str]], Outcome]


def _line(tmp_path: Path, model: str, *more: str) -> list[str]:
    """12 steps of 4 samples, saved every 4."""
    shards = tmp_path / "shards"
    pattern = f"{shards}/{{000..003}}.tar" if shards.exists() else write_shards(shards, shards=4, samples=12)
    flags = (
        "--precision fp32 --device cpu --epochs 1 --workers 0 --warmup 2 --lr 1e-3 --seed 3 --log-every-n-steps 1 "
        "--save-every-n-steps 4 --keep-checkpoints 20 --data-lanes 4 --resume latest --local-loss --gather-with-grad"
    )
    place = ["--train-data", pattern, "--model", model, "--logs", str(tmp_path / "logs"), "--name", "r"]
    return [*flags.split(), *place, *more]


def _cut(run: Path, *, after: int) -> None:
    """As if the run had died after this step."""
    for step in Checkpointer(run / "checkpoints").steps():
        if step > after:
            shutil.rmtree(Checkpointer(run / "checkpoints").path(step))
    for path in (run / "checkpoints").glob("*.pt"):
        path.unlink()


def _state(run: Path) -> tuple[StepCheckpoint, list[float]]:
    """The last checkpoint, and the loss of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    return read_step_checkpoint(Checkpointer(run / "checkpoints").path(12)), [losses[step] for step in sorted(losses)]


def _assert_close(run: Path, expected: tuple[StepCheckpoint, list[float]]) -> None:
    found, losses = _state(run)
    assert losses == pytest.approx(expected[1], abs=1e-5)
    for kind in ("model", "optimizer"):
        left, right = getattr(found, kind), getattr(expected[0], kind)
        assert set(left) == set(right)
        # No gradient reaches the bias of keys but rounding errors, and Adam makes full updates of those.
        for name in [name for name in left if "in_proj_bias" not in name]:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


def test_a_run_that_is_sharded_for_a_while_learns_what_one_that_never_was_learns(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    run = tmp_path / "logs/r"
    alone = _line(tmp_path, tiny_model, "--batch-size", "4")
    assert run_here(alone).code == 0
    shutil.copytree(run, tmp_path / "uninterrupted")
    expected = _state(tmp_path / "uninterrupted")
    _cut(run, after=4)
    sharded = _line(tmp_path, tiny_model, "--batch-size", "2", "--fsdp")
    for outcome in run_ranks_to_end(sharded, world_size=2, timeout_s=300):
        assert outcome.code == 0, outcome.text
    assert read_manifest(run / "checkpoints/step_00000008").shard_ranks == 2
    _assert_close(run, expected)
    exported = torch.load(run / "checkpoints/epoch_1.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(exported[name], tensor) for name, tensor in _state(run)[0].model.items())
    _cut(run, after=8)
    assert run_here(alone).code == 0
    _assert_close(run, expected)
