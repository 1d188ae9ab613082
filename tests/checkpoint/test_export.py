from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from training.checkpoint.export import delete_epoch_file, newest_epoch_file, read_epoch_file, write_epoch_file

CONTENT = {
    "epoch": 3,
    "name": "run",
    "state_dict": {"w": torch.ones(2)},
    "optimizer": {"state": {}, "param_groups": []},
}


def test_numbered_and_latest_are_written_once_and_read_back(tmp_path: Path) -> None:
    paths = write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=True, latest=True)
    assert [path.name for path in paths] == ["epoch_3.pt", "epoch_latest.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_3.pt", "epoch_latest.pt"]
    for path in paths:
        read = read_epoch_file(str(path))
        assert (read.epoch, read.scaler) == (3, None)
        assert torch.equal(read.state_dict["w"], torch.ones(2))


def test_latest_is_written_where_hard_links_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=True, latest=True)
    assert read_epoch_file(str(tmp_path / "epoch_latest.pt")).epoch == 3


def test_nothing_due_writes_nothing(tmp_path: Path) -> None:
    assert write_epoch_file(tmp_path, CONTENT, epoch=3, numbered=False, latest=False) == []
    assert list(tmp_path.iterdir()) == []


def test_the_newest_epoch_is_chosen_by_number_and_nothing_else_by_name(tmp_path: Path) -> None:
    assert newest_epoch_file(tmp_path) is None
    for name in ("epoch_9.pt", "epoch_10.pt", "tmp.pt", "results.jsonl", "epoch_x.pt"):
        (tmp_path / name).touch()
    assert newest_epoch_file(tmp_path) == tmp_path / "epoch_10.pt"
    (tmp_path / "epoch_latest.pt").touch()
    assert newest_epoch_file(tmp_path) == tmp_path / "epoch_latest.pt"


def test_files_of_distributed_open_clip_runs_lose_their_prefix(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {"module.visual.proj": torch.zeros(1)}}, tmp_path / "epoch_1.pt")
    assert list(read_epoch_file(str(tmp_path / "epoch_1.pt")).state_dict) == ["visual.proj"]


def test_bare_weights_start_at_epoch_zero(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    read = read_epoch_file(str(tmp_path / "w.pt"))
    assert (read.epoch, read.optimizer, list(read.state_dict)) == (0, None, ["w"])


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("kind", ["malicious", "truncated", "text", "missing"])
def test_unreadable_files_are_an_error_and_run_no_code(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "epoch_1.pt"
    if kind == "malicious":
        torch.save({"state_dict": _Malice()}, path)
    elif kind == "truncated":
        torch.save(CONTENT, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "text":
        path.write_text("<html>")
    with pytest.raises(ValueError, match=r"epoch_1\.pt.*cannot be read as a checkpoint.*--resume"):
        read_epoch_file(str(path))
    assert not (tmp_path / "canary").exists()


def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path) -> None:
    torch.save(torch.zeros(1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a Tensor and no checkpoint"):
        read_epoch_file(str(tmp_path / "x.pt"))


def test_previous_epoch_files_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pt").touch()
    delete_epoch_file(tmp_path, epoch=1)
    delete_epoch_file(tmp_path, epoch=1)
    assert list(tmp_path.iterdir()) == []
