"""The command line of ``clipyard doctor`` on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.bad_nodes import BAD_NODES_FILE, read_suspects
from training.commands.doctor import find_run, main, read_config
from training.config import Config

QUICK = ["--quick", "--device=cpu"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)


def test_a_laptop_is_examined_and_everything_is_written_down(tmp_path: Path, capsys):
    assert main([*QUICK, f"--run={tmp_path}", f"--json={tmp_path}/all.json"]) == 0
    shown = capsys.readouterr().out
    assert "All 1 node(s) can be trained on." in shown
    assert "torch finds no CUDA device" in shown or "not looked at, as --device cpu says" in shown
    found = json.loads((tmp_path / "all.json").read_text())
    assert (found["exit_code"], found["exclude"]) == (0, [])
    assert {finding["check"] for finding in found["nodes"][0]["findings"]} >= {"modules", "run directory", "shards"}
    assert not (tmp_path / "bad_nodes.jsonl").exists()


def test_data_that_is_not_there_is_the_users_to_mend(tmp_path: Path, capsys):
    assert main([*QUICK, f"--train-data={tmp_path}/none.tar", "--train-num-samples=9"]) == 2
    shown = capsys.readouterr().out
    assert "BAD   all nodes  shards: 1 of 1 shards do not exist" in shown
    assert "No node is to be excluded; what is bad must be mended first." in shown


def test_a_broken_machine_has_code_95_and_is_on_the_list(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("SLURMD_NODENAME", "jwb0042")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU is lost; exit 15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main([*QUICK, f"--run={tmp_path}"]) == 95
    (line,) = (tmp_path / "bad_nodes.jsonl").read_text().splitlines()
    assert json.loads(line)["node"] == "jwb0042"
    assert json.loads(line)["reason"].startswith("doctor: GPU health: nvidia-smi ended with 15: GPU is lost")


def test_a_verdict_that_cannot_be_written_is_no_success(tmp_path: Path, caplog):
    assert main([*QUICK, f"--json={tmp_path}/none/all.json"]) == 2
    assert "The verdict cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--slurm"], "--slurm, but no srun started this process"),
        (["--batch-size", "none"], "--batch-size"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_line_is_answered_at_once(line: list[str], message: str, capsys):
    assert main(line) == 2
    assert message in capsys.readouterr().err


def test_launchers_that_say_half_are_asked_for_the_rest(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(QUICK) == 2
    assert "MASTER_ADDR and MASTER_PORT are not set" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "http")
    assert main(QUICK) == 2
    assert "MASTER_PORT='http' is not a number" in capsys.readouterr().err


def test_settings_come_from_the_line_or_from_the_run(tmp_path: Path):
    (tmp_path / "submit.yaml").write_text("train-data: x.tar\ntrain-num-samples: 5\n")
    assert read_config([], tmp_path).data.train_data == "x.tar"
    assert read_config(["--train-data=y.tar"], tmp_path).data.train_data == "y.tar"
    assert read_config([], None).data.train_data is None
    assert find_run(Config(), None) is None
    assert find_run(read_config(["--logs=/l", "--name=n"], None), None) == Path("/l/n")
    assert find_run(Config(), Path("/r")) == Path("/r")


def begin_without_torch(directory: Path, **slurm: str) -> subprocess.CompletedProcess[str]:
    (directory / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    line = [sys.executable, "-m", "training.commands.main", "doctor", f"--run={directory / 'run'}"]
    environment = os.environ | {"PYTHONPATH": f"{directory}:."} | slurm
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("rank", "code"), [("0", 95), ("3", 0)])
def test_a_node_whose_torch_is_broken_says_so_and_leaves_the_verdict_to_rank_0(tmp_path: Path, rank: str, code: int):
    done = begin_without_torch(tmp_path, SLURM_PROCID=rank, SLURMD_NODENAME="jwb0042")
    assert done.returncode == code
    assert "jwb0042" in done.stderr
    assert "cannot begin (ImportError: libcudart.so.13" in done.stderr
    listed = [suspect.node for suspect in read_suspects(tmp_path / "run" / BAD_NODES_FILE)]
    assert listed == (["jwb0042"] if code else [])


def test_an_environment_that_is_broken_on_the_next_node_too_is_the_jobs_trouble(tmp_path: Path):
    codes = [begin_without_torch(tmp_path, SLURMD_NODENAME=node).returncode for node in ("a", "a", "b")]
    assert codes == [95, 95, 2]
    assert [suspect.node for suspect in read_suspects(tmp_path / "run" / BAD_NODES_FILE)] == ["a"]
    assert begin_without_torch(tmp_path).returncode == 2


def test_a_list_that_cannot_be_written_does_not_hide_the_node(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    done = begin_without_torch(tmp_path, SLURMD_NODENAME="a")
    assert (done.returncode, "a cannot be put on the list" in done.stderr) == (95, True)
