"""``--remote-sync`` and ``--resume URL`` at the start of a run, without the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint
from training.checkpoint.manifest import DamagedCheckpoint, verify
from training.checkpoint.mirror_run import bring_back, fetch_resume, is_remote_run, open_mirror
from training.checkpoint.mirror_store import FsspecObjects
from training.config import CheckpointConfig
from training.data.storage_errors import StorageError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has been mirrored."""
    directory = tmp_path / "logs" / "run"
    for step in (10, 20):
        save(directory, step)
    (directory / "starts.jsonl").write_text('{"step": 0}\n')
    mirror = open_mirror(config(tmp_path), run=directory, name="run")
    assert mirror is not None
    assert mirror.upload_once()
    return directory


def config(tmp_path: Path, **changes: object) -> CheckpointConfig:
    url = {"remote_sync": f"file://{tmp_path}/away/", "remote_sync_protocol": "fsspec"}
    return CheckpointConfig(**{"resume": "latest", **url, **changes})  # type: ignore[arg-type]


def save(run: Path, step: int) -> None:
    tensor = torch.full((3,), float(step))
    Checkpointer(run / "checkpoints").save(step, StepCheckpoint({"w": tensor}, {}, {}, {}, {"step": step}))


def test_a_lost_directory_comes_back(run: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    url = f"file://{tmp_path}/away/run"
    assert bring_back(config(tmp_path), run=back, name="run") == [
        f"Fetched 2 files of the run's history from {url}.",
        f"Fetched step_00000020 from {url}.",
    ]
    verify(back / "checkpoints" / "step_00000020")
    assert (back / "starts.jsonl").read_text() == '{"step": 0}\n'


def test_nothing_is_fetched_where_nothing_is_missing_or_wanted(run: Path, tmp_path: Path) -> None:
    assert bring_back(config(tmp_path), run=run, name="run") == []
    for settings in (config(tmp_path, resume=None), config(tmp_path, remote_sync=None)):
        assert bring_back(settings, run=tmp_path / "back", name="run") == []
        assert not (tmp_path / "back").exists()
    assert bring_back(config(tmp_path), run=tmp_path / "new", name="another") == []


def test_starting_from_zero_over_damaged_checkpoints_has_to_be_allowed(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "away").glob("run/checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="None of the 2 step checkpoints"):
        bring_back(config(tmp_path), run=tmp_path / "back", name="run")
    allowed = config(tmp_path, allow_restart_from_zero=True)
    bring_back(allowed, run=tmp_path / "back", name="run")
    assert not list((tmp_path / "back" / "checkpoints").glob("step_*"))


def test_a_storage_that_does_not_answer_is_no_bad_usage(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FsspecObjects, prefix: str = "") -> None:
        raise StorageError("it failed 6 times")

    monkeypatch.setattr(FsspecObjects, "list", fail)
    with pytest.raises(RuntimeError, match="--remote-sync: it failed 6 times"):
        bring_back(config(tmp_path), run=tmp_path / "back", name="run")
    resume = config(tmp_path, resume=f"file://{tmp_path}/away/run")
    with pytest.raises(RuntimeError, match="--resume: it failed 6 times"):
        fetch_resume(resume, checkpoints=tmp_path / "back")


def test_a_url_to_resume_from_needs_a_directory(run: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, resume=f"file://{tmp_path}/away/run", remote_sync=None)
    assert fetch_resume(settings, checkpoints=tmp_path / "back").endswith("back/step_00000020")
    with pytest.raises(ValueError, match="--resume URL with --logs none"):
        fetch_resume(settings, checkpoints=None)


@pytest.mark.parametrize(
    ("resume", "expected"),
    [("s3://b/runs/run", True), ("s3://b/epoch_1.pt", False), ("latest", False), ("logs/run", False)],
)
def test_a_single_file_is_no_mirrored_run(resume: str, expected: bool) -> None:
    assert is_remote_run(resume) is expected


def test_a_mirror_is_opened_only_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    assert open_mirror(config(tmp_path, remote_sync=None), run=run, name="run") is None
    for resume in (None, "logs/other"):
        with pytest.raises(ValueError, match="another run of this name"):
            open_mirror(config(tmp_path, resume=resume), run=run, name="run")
    assert open_mirror(config(tmp_path, resume=f"file://{tmp_path}/away/run/"), run=run, name="run") is not None
