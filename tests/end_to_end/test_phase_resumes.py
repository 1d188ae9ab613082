"""Runs with a curriculum go on where the ends of a phase and of an epoch meet, and from files of a later phase."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Outcome
from tests.factories import write_shards
from training.checkpoint.checkpointer import Checkpointer

Run = Callable[[Sequence[str]], Outcome]
PHASES = "- {until_samples: 40, image_size: 16, batch_size: 12}\n- {batch_size: 4}\n"
"""Epochs of 40 samples: the first ends with the first phase, 8 samples late."""


def _line(tmp_path: Path, model: str, *more: str, phases: str = PHASES, name: str = "r") -> list[str]:
    shards, curriculum = tmp_path / "shards", tmp_path / "phases.yaml"
    pattern = f"{shards}/{{000..001}}.tar" if shards.exists() else write_shards(shards, shards=2, samples=20)
    curriculum.write_text(phases)
    flags = (
        "--precision fp32 --device cpu --epochs 3 --batch-size 8 --workers 0 --warmup 2 --val-num-samples 8 "
        "--keep-checkpoints 20 --save-frequency 1"
    )
    paths = ["--train-data", pattern, "--val-data", pattern, "--model", model, "--logs", str(tmp_path / "logs")]
    return [*flags.split(), *paths, "--phases", str(curriculum), "--name", name, *more]


def test_what_is_owed_at_the_end_of_an_epoch_is_made_up_for_in_the_next_phase(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    """The step that ended the epoch was larger than those of the phase that follows."""
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    checkpoints = tmp_path / "logs/r/checkpoints"
    steps = Checkpointer(checkpoints)
    assert steps.steps() == [4, 12, 22]
    for step in (12, 22):
        shutil.rmtree(steps.path(step))
    for path in [*checkpoints.glob("epoch_*.pt"), checkpoints / "results.jsonl"]:
        path.unlink()
    outcome = run_here(_line(tmp_path, tiny_model, "--resume", "latest"))
    assert outcome.code == 0, outcome.text
    assert "Epoch 1 has a checkpoint" in outcome.text
    assert [json.loads(line)["epoch"] for line in (checkpoints / "results.jsonl").open()] == [1, 2, 3]
    assert (checkpoints / "epoch_1.pt").exists()


def test_an_epoch_file_of_a_later_phase_begins_in_that_phase(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    file = tmp_path / "logs/r/checkpoints/epoch_2.pt"
    outcome = run_here(_line(tmp_path, tiny_model, "--resume", str(file), name="other"))
    assert outcome.code == 0, outcome.text
    assert f"Resumed from {file} at step 12 (80 samples seen)." in outcome.text
    assert "Phase 1 of 2" not in outcome.text
    assert Checkpointer(tmp_path / "logs/other/checkpoints").steps() == [22]


def test_a_batch_that_is_more_than_an_epoch_is_refused_before_anything_is_built(
    run_here: Run, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("training.stage.build_trained_model")
    refused = run_here(_line(tmp_path, tiny_model, phases="- {until_samples: 40}\n- {batch_size: 41}\n"))
    assert refused.code == 2, refused.text
    assert "phase 2: its global batch of 41 (41 per rank x 1) is more than an epoch of 40 samples" in refused.text


def test_what_keeps_a_phase_from_beginning_is_one_line_and_a_code(
    run_here: Run, tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("there is none")

    monkeypatch.setattr("training.stage.load", refuse)
    refused = run_here(_line(tmp_path, tiny_model))
    assert refused.code == 2, refused.text
    assert "The next phase cannot begin: there is none" in refused.text
    assert "Traceback" not in refused.text
