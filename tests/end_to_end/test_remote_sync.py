"""A run whose directory is lost goes on from its mirror and ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.checkpoint.upload_server import UploadBucket, UploadServer
from tests.end_to_end.conftest import Outcome, start_ranks
from tests.end_to_end.test_resume import _line, _losses, _weights
from tests.s3.server import Fault
from training.checkpoint.mirror_fetch import RemoteRun
from training.checkpoint.mirror_store import open_store

Run = Callable[[Sequence[str]], Outcome]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadBucket]:
    server = UploadServer()
    bucket = UploadBucket(server, "runs")
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    yield bucket
    server.close()


def _mirrored_steps(url: str) -> list[int]:
    return RemoteRun(open_store(url)).steps()


def test_a_killed_run_whose_directory_is_gone_resumes_from_s3(
    tmp_path: Path, tiny_model: str, run_here: Run, bucket: UploadBucket
) -> None:
    logs = tmp_path / "logs"
    whole = run_here(_line(tmp_path, tiny_model, "whole"))
    assert whole.code == 0, whole.text
    saves = ("--save-every-n-steps", "8", "--keep-checkpoints", "12")
    mirrored = ("--remote-sync", bucket.url("runs"), "--remote-sync-frequency", "1")
    line = _line(tmp_path, tiny_model, "run", *saves, *mirrored)
    first = _kill_when_mirrored(line, bucket.url("runs/run"))
    shutil.rmtree(logs / "run")
    resumed = run_here(line)
    assert resumed.code == 0, resumed.text
    assert f"Fetched step_{first:08d} from" in resumed.text
    assert _weights(logs / "run") == _weights(logs / "whole")
    assert _losses(logs / "run") == _losses(logs / "whole")
    starts = [json.loads(text)["step"] for text in (logs / "run" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] == first
    assert _mirrored_steps(bucket.url("runs/run"))[-1] == 72
    assert bucket.get("runs/run/metrics.jsonl") == (logs / "run" / "metrics.jsonl").read_bytes()


def _kill_when_mirrored(line: list[str], url: str) -> int:
    """Kills the run soon after a checkpoint is mirrored; leaves that one alone there, and returns its step."""
    (process,) = start_ranks(line, world_size=1)
    deadline = time.monotonic() + 60
    while not _mirrored_steps(url):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first, *later = _mirrored_steps(url)
    open_store(url).delete([f"checkpoints/step_{step:08d}/MANIFEST.json" for step in later])
    return first


def test_a_run_that_went_on_elsewhere_and_comes_back_loses_nothing_there(
    tmp_path: Path, tiny_model: str, run_here: Run
) -> None:
    away = f"file://{tmp_path}/away"
    mirrored = ("--remote-sync", away, "--remote-sync-protocol", "fsspec", "--save-every-n-steps", "24")
    more = ("--allow-config-change", "epochs")

    def train_on(machine: str, epochs: int) -> tuple[list[int], list[int]]:
        logs = str(tmp_path / machine)
        line = _line(tmp_path, tiny_model, "run", *mirrored, "--logs", logs, "--epochs", str(epochs), *more)
        outcome = run_here(line)
        assert outcome.code == 0, outcome.text
        there = tmp_path / "away" / "run"
        starts = [json.loads(text)["step"] for text in (there / "starts.jsonl").read_text().splitlines()]
        metrics = [json.loads(text) for text in (there / "metrics.jsonl").read_text().splitlines()]
        return starts, [line["step"] for line in metrics if "train/loss" in line]

    assert train_on("a", 1) == ([0], list(range(24)))
    assert train_on("b", 2) == ([0, 24], list(range(48)))
    assert train_on("a", 3) == ([0, 24, 48], list(range(72)))
    (aside,) = (tmp_path / "a" / "run" / "superseded").glob("*/starts.jsonl")
    assert len(aside.read_text().splitlines()) == 1
    assert _mirrored_steps(f"{away}/run")[-1] == 72


def test_a_new_run_starts_from_the_url_of_another(tmp_path: Path, tiny_model: str, run_here: Run) -> None:
    away = f"file://{tmp_path}/away"
    mirrored = ("--remote-sync", away, "--remote-sync-protocol", "fsspec", "--epochs", "1")
    assert run_here(_line(tmp_path, tiny_model, "run", *mirrored)).code == 0
    step = _mirrored_steps(f"{away}/run")[0]
    url = f"{away}/run/checkpoints/step_{step:08d}"
    again = run_here(_line(tmp_path, tiny_model, "child", "--resume", url, "--epochs", "1"))
    assert again.code == 0, again.text
    logs = tmp_path / "logs"
    assert _weights(logs / "child") == _weights(logs / "run")
    assert json.loads((logs / "child" / "starts.jsonl").read_text())["step"] == step


def test_a_url_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, tiny_model: str, run_here: Run, bucket: UploadBucket
) -> None:
    outcome = run_here(_line(tmp_path, tiny_model, "run", "--remote-sync", "s3://moto-none/runs"))
    assert outcome.code == 2
    assert "NoSuchBucket" in outcome.text
    assert "Traceback" not in outcome.text
    assert not list((tmp_path / "logs" / "run" / "checkpoints").glob("step_*"))


def test_a_run_of_the_same_name_elsewhere_is_refused(tmp_path: Path, tiny_model: str, run_here: Run) -> None:
    mirrored = ("--remote-sync", f"file://{tmp_path}/away", "--remote-sync-protocol", "fsspec", "--epochs", "1")
    line = _line(tmp_path, tiny_model, "run", *mirrored)
    assert run_here(line).code == 0
    shutil.rmtree(tmp_path / "logs" / "run")
    line.remove("--resume")
    line.remove("latest")
    outcome = run_here(line)
    assert outcome.code == 2
    assert "holds checkpoints of another run of this name" in outcome.text


def test_training_goes_on_when_the_storage_refuses(
    tmp_path: Path, tiny_model: str, run_here: Run, bucket: UploadBucket
) -> None:
    for step in range(2, 26, 2):
        bucket.faults(f"runs/run/checkpoints/step_{step:08d}/model.safetensors", Fault(status=403, code="AccessDenied"))
    line = _line(tmp_path, tiny_model, "run", "--remote-sync", bucket.url("runs"), "--epochs", "1")
    outcome = run_here(line)
    assert outcome.code == 0
    assert "403 AccessDenied" in outcome.text
    assert "clipyard checkpoints mirror" in outcome.text
    assert "Finished run" in outcome.text
