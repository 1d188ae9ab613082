from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.checkpoint.average import average_weights, read_weights
from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint
from training.checkpoint.manifest import DamagedCheckpoint

NAMES = ("step 1", "step 2", "step 3")


def test_the_mean_is_that_of_double_precision() -> None:
    torch.manual_seed(0)
    models = [{"w": torch.randn(7, 5), "n": torch.tensor(step)} for step in (1, 2, 3)]
    mean = average_weights(models, names=NAMES)
    expected = torch.stack([model["w"].double() for model in models]).mean(0).float()
    assert torch.equal(mean["w"], expected)
    assert mean["w"].dtype == torch.float32
    assert mean["n"].item() == 3  # a counter is not averaged


def test_many_half_precision_weights_lose_nothing_on_the_way() -> None:
    models = [{"w": torch.tensor([1.0, 1e-3], dtype=torch.bfloat16)}] * 300
    assert torch.equal(average_weights(models, names=["x"] * 300)["w"], models[0]["w"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.ones(3)}, r"step 1 and step 2 are not of the same model.*'w' \(float32 \(2,\) and float32 \(3,\)"),
        ({"w": torch.ones(2), "b": torch.ones(1)}, r"'b' \(absent and float32"),
        ({"w": torch.ones(2, dtype=torch.float16)}, r"float32 \(2,\) and float16"),
    ],
)
def test_models_that_differ_are_not_averaged(other: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_weights([{"w": torch.ones(2)}, other], names=NAMES[:2])


def test_a_ruined_model_does_not_ruin_the_mean() -> None:
    models = [{"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("nan")])}]
    with pytest.raises(ValueError, match=r"step 2 holds weights that are not finite \('w'\)"):
        average_weights(models, names=NAMES[:2])


def test_one_model_is_no_average() -> None:
    with pytest.raises(ValueError, match="1 checkpoints are no average"):
        average_weights([{"w": torch.ones(2)}], names=NAMES[:1])


def test_weights_are_read_from_a_verified_checkpoint_only(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    path = Checkpointer(tmp_path).save(1, StepCheckpoint({"w": tensor}, {}, {}, {}, {}))
    assert torch.equal(read_weights(path)["w"], tensor)
    (path / "train.json").write_text("{ }")
    with pytest.raises(DamagedCheckpoint, match=r"train\.json"):
        read_weights(path)
