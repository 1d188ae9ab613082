"""A run that is killed at any moment and started again by the same line ends with the same weights, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import Outcome, run_ranks_to_end, start_ranks
from tests.factories import write_shards
from training.checkpoint.checkpointer import Checkpointer
from training.commands.data_trace import main as data_trace
from training.commands.data_trace import trace_step
from training.data.trace import read_trace

Run = Callable[[Sequence[str]], Outcome]


def _line(tmp_path: Path, model: str, name: str, *more: str) -> list[str]:
    shards = tmp_path / "shards"
    pattern = f"{shards}/{{000..003}}.tar" if shards.exists() else write_shards(shards, shards=4, samples=24)
    flags = (
        "--precision fp32 --device cpu --epochs 3 --batch-size 4 --workers 1 --warmup 2 --lr 1e-3 "
        "--force-patch-dropout 0.5 --aug-cfg scale=(0.4,1.0) color_jitter_prob=0.8 color_jitter=(0.3,0.3,0.3,0.1) "
        "--log-every-n-steps 1 --save-every-n-steps 2 --save-most-recent --resume latest "
        "--local-loss --gather-with-grad"
    )
    logs = str(tmp_path / "logs")
    return [*flags.split(), "--train-data", pattern, "--model", model, "--logs", logs, "--name", name, *more]


def _weights(run: Path) -> str:
    newest = Checkpointer(run / "checkpoints", keep=2).newest()
    assert newest is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(newest / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _losses(run: Path) -> dict[int, float]:
    return {int(line["step"]): line["train/loss"] for line in _metrics(run) if "train/loss" in line}


def _kill_when_saved(argv: list[str], run: Path, *, step: int) -> None:
    """Starts two ranks and kills both with signal 9 soon after the checkpoint of ``step``."""
    processes = start_ranks(argv, world_size=2)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if any(found >= step for found in Checkpointer(run / "checkpoints", keep=2).steps()):
            break
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


@pytest.mark.parametrize("extra", [[], ["--accum-freq", "2"]], ids=["plain", "accumulated"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, tiny_model: str, extra: list[str]
) -> None:
    logs = tmp_path / "logs"
    whole = run_ranks_to_end(_line(tmp_path, tiny_model, "whole", *extra), world_size=2)
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].text + whole[1].text
    _kill_when_saved(_line(tmp_path, tiny_model, "killed", *extra), logs / "killed", step=4)
    resumed = run_ranks_to_end(_line(tmp_path, tiny_model, "killed", *extra), world_size=2)
    assert [outcome.code for outcome in resumed] == [0, 0], resumed[0].text + resumed[1].text
    assert "Resumed from" in resumed[0].text
    assert _weights(logs / "killed") == _weights(logs / "whole")
    assert _losses(logs / "killed") == _losses(logs / "whole")


def test_a_finished_run_that_is_started_again_has_nothing_to_do(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    line = _line(tmp_path, tiny_model, "r", "--epochs", "1")
    assert run_here(line).code == 0
    before = _weights(tmp_path / "logs/r")
    again = run_here(line)
    assert again.code == 0
    assert "Train Epoch" not in again.text
    assert _weights(tmp_path / "logs/r") == before


def test_a_run_that_open_clip_began_goes_on_here(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    line = _line(tmp_path, tiny_model, "r")
    assert run_here([*line, "--epochs", "1"]).code == 0
    checkpoints = tmp_path / "logs/r/checkpoints"
    content = torch.load(checkpoints / "epoch_1.pt", weights_only=True)
    for left in [*checkpoints.glob("step_*/*"), *checkpoints.glob("step_*"), checkpoints / "epoch_latest.pt"]:
        left.rmdir() if left.is_dir() else left.unlink()
    # As open_clip 3.3.0 writes it under data parallelism.
    content["state_dict"] = {f"module.{name}": value for name, value in content["state_dict"].items()}
    torch.save({key: content[key] for key in ("epoch", "name", "state_dict", "optimizer")}, checkpoints / "epoch_1.pt")
    outcome = run_here(line)
    assert outcome.code == 0, outcome.text
    assert "epoch_1.pt at step 24" in outcome.text
    assert min(step for step in _losses(tmp_path / "logs/r") if step >= 24) == 24


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    line = _line(tmp_path, tiny_model, "r", "--epochs", "1")
    assert run_here(line).code == 0
    for weights in (tmp_path / "logs/r/checkpoints").glob("step_*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-4] + b"ruin")
    outcome = run_here(line)
    assert outcome.code == 93, "starting again would end the same way"
    assert "None of the 2 step checkpoints" in outcome.text
    checkpoints = tmp_path / "logs/r/checkpoints"
    for path in checkpoints.glob("*.pt"):
        path.unlink()  # it would be gone on from
    assert run_here([*line, "--allow-restart-from-zero"]).code == 0
    assert len(list(checkpoints.glob("damaged-step_*"))) == 2
    assert Checkpointer(checkpoints).newest() == checkpoints / "step_00000024"


def _traced(run: Path) -> list[tuple[int, int, int]]:
    """(step, slot, raw index) of every sample that went into the weights, in no order."""
    return [tuple(record) for records in read_trace(run / "trace").values() for record in records.tolist()]


def test_on_two_then_three_ranks_then_one_every_sample_of_the_epoch_comes_once(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    """The epoch's 96 samples lie in 16 slots; ``--train-num-samples`` cuts the run into legs of 32."""
    line = _line(tmp_path, tiny_model, "r", "--trace-samples", "--train-num-samples", "32")
    line += ["--allow-config-change", "epochs"]
    for epochs, world in ((1, 2), (2, 3)):
        outcomes = run_ranks_to_end([*line, "--epochs", str(epochs)], world_size=world)
        assert [outcome.code for outcome in outcomes] == [0] * world, outcomes[0].text
    outcome = run_here([*line, "--epochs", "6", "--workers", "2"])
    assert outcome.code == 0, outcome.text
    assert "The data goes on over 1 ranks, before: 3." in outcome.text
    seen = Counter((slot, raw_index) for _, slot, raw_index in _traced(tmp_path / "logs/r"))
    assert {sample for sample in seen if sample[0] < 16} == {(slot, index) for slot in range(16) for index in range(6)}
    assert set(seen.values()) == {1}
    steps = [step for step, *_ in _traced(tmp_path / "logs/r")]
    assert set(steps) == set(range(max(steps) + 1))


def test_the_schedule_follows_the_samples_seen_when_the_global_batch_changes(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    line = _line(tmp_path, tiny_model, "r", "--epochs", "2", "--save-every-n-steps", "0")
    line += ["--allow-config-change", "epochs"]
    assert run_here([*line, "--epochs", "1"]).code == 0
    before = [entry for entry in _metrics(tmp_path / "logs/r") if "train/lr" in entry]
    assert run_here([*line, "--batch-size", "8"]).code == 0
    after = [entry for entry in _metrics(tmp_path / "logs/r") if entry.get("train/samples_seen", 0) > 96]
    assert (before[-1]["step"], after[0]["step"], after[-1]["step"]) == (23, 24, 35)
    assert after[0]["train/epoch"] == 1.0
    assert after[-1]["train/samples_seen"] == 192


def test_a_trace_names_the_samples_of_a_step_with_and_without_the_record(
    run_here: Run, tmp_path: Path, tiny_model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = _line(tmp_path, tiny_model, "r", "--trace-samples", "--epochs", "1", "--keep-checkpoints", "20")
    assert run_here(line).code == 0
    run = tmp_path / "logs/r"
    recorded = trace_step(run, 5)
    shutil.rmtree(run / "trace")
    assert trace_step(run, 5) == recorded
    assert data_trace(["--step", "5", str(run)]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert len(shown) == 4
    assert shown[0].split("\t") == ["0", recorded[0].shard, recorded[0].key]
    assert data_trace(["--step", "5", str(tmp_path)]) == 2
    assert "starts.jsonl does not exist" in capfd.readouterr().err


def test_other_workers_and_lanes_are_no_obstacle(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    line = _line(tmp_path, tiny_model, "r", "--epochs", "1")
    assert run_here(line).code == 0
    outcome = run_here([*line, "--workers", "2", "--data-lanes", "3"])
    assert outcome.code == 0, outcome.text
    assert "Changed since step 24: --data-lanes 0 -> 3, --workers 1 -> 2." in outcome.text
