"""What may change when a run goes on, what may not, and what the run's history says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import Outcome
from tests.factories import write_shards
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import read_manifest
from training.commands.data_trace import main as data_trace
from training.commands.report import main as report

Run = Callable[[Sequence[str]], Outcome]


def _line(tmp_path: Path, model: str, *more: str, name: str = "r") -> list[str]:
    """24 steps of 4 samples in each of 2 epochs, saved every 6 steps."""
    shards = tmp_path / "shards"
    pattern = f"{shards}/{{000..003}}.tar" if shards.exists() else write_shards(shards, shards=4, samples=24)
    flags = (
        "--precision fp32 --device cpu --epochs 2 --batch-size 4 --workers 0 --warmup 2 --lr 1e-3 --seed 3 "
        "--log-every-n-steps 1 --save-every-n-steps 6 --keep-checkpoints 20 --save-frequency 0 --resume latest"
    )
    logs = str(tmp_path / "logs")
    return [*flags.split(), "--train-data", pattern, "--model", model, "--logs", logs, "--name", name, *more]


def _cut(run: Path, *, after: int) -> int:
    """As if the run had died after this step; returns the newest that is saved: one is left out now and then."""
    checkpointer = Checkpointer(run / "checkpoints")
    for step in checkpointer.steps():
        if step > after:
            shutil.rmtree(checkpointer.path(step))
    (run / "checkpoints/results.jsonl").unlink(missing_ok=True)
    return checkpointer.steps()[-1]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _metrics(run: Path) -> dict[int, dict[str, float]]:
    return {int(line["step"]): line for line in _json_lines(run / "metrics.jsonl") if "train/loss" in line}


def _tensors(run: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Checkpointer(run / "checkpoints").path(step) / f"{kind}.safetensors")


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_makes_it_another_run_is_refused_until_it_is_named(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    step = _cut(run, after=42)
    refused = run_here(_line(tmp_path, tiny_model, "--wd", "0.1", "--lr", "2e-3"))
    assert refused.code == 2
    assert "--wd  saved 0.2  now 0.1" in refused.text
    assert "--allow-config-change wd" in refused.text
    allowed = run_here(_line(tmp_path, tiny_model, "--wd", "0.1", "--lr", "2e-3", "--allow-config-change", "wd"))
    assert allowed.code == 0, allowed.text
    assert f"Changed since step {step}: --lr 0.001 -> 0.002, --wd 0.2 -> 0.1." in allowed.text
    first, last = _json_lines(run / "starts.jsonl")
    assert (first["step"], first["resumed_from"], first["changes"]) == (0, None, {})
    assert (last["step"], last["changes"]) == (step, {"lr": [0.001, 0.002], "wd": [0.2, 0.1]})
    assert last["resumed_from"].endswith(f"step_{step:08d}")


@pytest.mark.parametrize(
    "change",
    # 20 are five times as many, and no divisor of an epoch: it stays as long as it was, and the run as well.
    [["--accum-freq", "2"], ["--batch-size", "8"], ["--accum-freq", "3"], ["--batch-size", "20"]],
    ids=" ".join,
)
def test_the_learning_rate_does_not_jump_with_the_global_batch(
    run_here: Run, tmp_path: Path, tiny_model: str, change: list[str]
) -> None:
    run, factor = tmp_path / "logs/r", {"2": 2, "8": 2, "3": 3, "20": 5}[change[1]]
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    whole = {line["train/samples_seen"]: line["train/lr"] for line in _metrics(run).values()}
    _cut(run, after=24)
    outcome = run_here(_line(tmp_path, tiny_model, *change))
    assert outcome.code == 0, outcome.text
    after = {step: line for step, line in _metrics(run).items() if step >= 24}
    assert (min(after), max(after)) == (24, 24 - -24 // factor - 1)
    for line in after.values():
        # A step's rate holds for all of its samples: it is that of the uninterrupted run at the first of them.
        begun = line["train/samples_seen"] - 4 * factor + 4
        assert line["train/lr"] == pytest.approx(whole[begun], rel=1e-6)
    assert _json_lines(run / "starts.jsonl")[-1]["changes"]["global_batch_size"] == [4, 4 * factor]


def test_the_loss_scaler_comes_and_goes_with_the_precision(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    line = _line(tmp_path, tiny_model, "--precision", "amp")
    assert run_here(line).code == 0
    _cut(run, after=12)
    dropped = run_here([*line, "--precision", "amp_bf16"])
    assert dropped.code == 0, dropped.text
    assert "The loss scaler's state is dropped: --precision amp_bf16 has no scaler." in dropped.text
    assert json.loads((run / "checkpoints/step_00000048/train.json").read_text())["scaler"] is None
    _cut(run, after=18)
    back = run_here(line)
    assert back.code == 0, back.text
    assert "The checkpoint has no loss scaler: it starts at its initial scale." in back.text
    assert json.loads((run / "checkpoints/step_00000048/train.json").read_text())["scaler"]["scale"] > 0


def test_weights_and_moments_are_cast_to_another_precision(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    line = _line(tmp_path, tiny_model)
    assert run_here(line).code == 0
    _cut(run, after=24)
    before = _tensors(run, 24, "optimizer")
    lowered = run_here([*line, "--precision", "pure_bf16"])
    assert lowered.code == 0, lowered.text
    assert {tensor.dtype for tensor in _tensors(run, 48).values()} == {torch.bfloat16}
    moments = {n: t for n, t in _tensors(run, 48, "optimizer").items() if n.endswith(("exp_avg", "exp_avg_sq"))}
    assert {tensor.dtype for tensor in moments.values()} == {torch.bfloat16}
    raised = run_here([*line, "--epochs", "3", "--allow-config-change", "epochs"])
    assert raised.code == 0, raised.text
    assert {tensor.dtype for tensor in _tensors(run, 72).values()} == {torch.float32}
    after = _tensors(run, 72, "optimizer")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(after[name] == 72 for name in after if name.endswith("//step"))
    assert all(0 < line["train/loss"] < 3 for line in _metrics(run).values())


def test_shards_on_another_disk_go_on_to_the_same_weights(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    whole = _tensors(run, 48)
    _cut(run, after=18)
    shutil.move(tmp_path / "shards", tmp_path / "another")
    outcome = run_here(_line(tmp_path, tiny_model, "--train-data", f"{tmp_path}/another/{{000..003}}.tar"))
    assert outcome.code == 0, outcome.text
    assert "in another place: the data goes on where it stood" in outcome.text
    assert _same(_tensors(run, 48), whole)
    assert _json_lines(run / "starts.jsonl")[-1]["new_data"] is None


def test_other_shards_are_a_new_epoch_if_they_are_meant(
    run_here: Run, tmp_path: Path, tiny_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "logs/r"
    line = _line(tmp_path, tiny_model, "--train-num-samples", "96")
    assert run_here(line).code == 0
    unread = 96 - 4 * _cut(run, after=18)
    more = write_shards(tmp_path / "more", shards=6, samples=24)
    outcome = run_here([*line, "--train-data", more])
    assert outcome.code == 0, outcome.text
    assert f"begins with epoch 1. About {unread} samples" in outcome.text
    start = _json_lines(run / "starts.jsonl")[-1]
    assert start["new_data"] == {"first_epoch": 1.0, "unread_samples": unread}
    assert list(start["changes"]) == ["train_data"]
    assert data_trace(["--step", "3", str(run)]) == 2
    assert "what was read before cannot be told any more" in capfd.readouterr().err


def test_shards_that_changed_under_the_same_name_are_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    line = _line(tmp_path, tiny_model, "--train-data", f"{tmp_path}/shards/*.tar")
    assert run_here(line).code == 0
    _cut(run, after=18)
    (tmp_path / "shards/003.tar").unlink()
    more = ["--train-num-samples", "96"]  # what was counted before
    refused = run_here([*line, *more, "--allow-config-change", "train-num-samples"])
    assert refused.code == 2
    assert "no setting says that this is meant" in refused.text
    meant = run_here([*line, *more, "--allow-config-change", "train-data"])
    assert meant.code == 0, meant.text
    assert "begins with epoch 1." in meant.text


def test_a_branch_goes_its_own_way_and_remembers_its_parent(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    parent, child = tmp_path / "logs/r", tmp_path / "logs/child"
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    checkpointer = Checkpointer(parent / "checkpoints")
    step = checkpointer.steps()[1]
    changes = ["--branch-from", f"r@{step}", "--wd", "0.1", "--opt", "stableadamw"]
    line = _line(tmp_path, tiny_model, *changes, name="child")
    outcome = run_here(line)
    assert outcome.code == 0, outcome.text
    assert min(_metrics(child)) == step
    assert _metrics(child)[step]["train/loss"] == _metrics(parent)[step]["train/loss"]
    (start,) = _json_lines(child / "starts.jsonl")
    sha256 = read_manifest(checkpointer.path(step)).sha256
    assert start["parent"] == {"run": str(parent), "step": step, "manifest_sha256": sha256}
    assert {"wd", "opt"} <= set(start["changes"])
    whole = _tensors(child, 48)
    newest = _cut(child, after=30)
    assert run_here(line).code == 0
    again = _json_lines(child / "starts.jsonl")[-1]
    assert (again["step"], again["parent"]) == (newest, None)
    assert _same(_tensors(child, 48), whole)
    assert not _same(_tensors(parent, 48), whole)


def test_a_branch_from_nowhere_is_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    outcome = run_here(_line(tmp_path, tiny_model, "--branch-from", "nobody@latest", name="child"))
    assert outcome.code == 2
    assert "--branch-from nobody@...: there is neither" in outcome.text


def test_the_report_of_a_run_tells_its_starts_and_changes(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    run = tmp_path / "logs/r"
    assert run_here(_line(tmp_path, tiny_model)).code == 0
    step = _cut(run, after=30)
    assert run_here(_line(tmp_path, tiny_model, "--lr", "3e-3")).code == 0
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    number = len(Checkpointer(run / "checkpoints").steps())
    for expected in ("Starts (2)", "lr: 0.001 -&gt; 0.003", f"step_{step:08d}", f"Checkpoints ({number})", ">Loss<"):
        assert expected in page
    assert page.count("<svg") >= 6
