"""The benchmark of steps with loaders: two programs in turn, the same batch for both, and sums that are right."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import alternate, check_gate, main, parse_arguments, rows, summarize, table_of_results
from benchmarks.end_to_end_arms import measure
from benchmarks.process_meter import process_tree
from benchmarks.scale_report import fill
from benchmarks.stopped_process import StoppedProcess
from tests.factories import jpeg_bytes, write_tiny_model

CPU = torch.device("cpu")
ECHO = "import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"


class _Recorder:
    """Stands for a program: remembers what it was asked, and when among all."""

    def __init__(self, name: str, asked: list[tuple[str, dict[str, Any]]]) -> None:
        self._name, self._asked = name, asked

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._asked.append((self._name, request))
        return {"step_ms": [1.0], "wait_ms": [0.0], "host_wait_ms": 0.0, "cpu_s": 0.0}


def _ask(*flags: str, end: float) -> list[tuple[str, dict[str, Any]]]:
    asked: list[tuple[str, dict[str, Any]]] = []
    processes: Any = {name: _Recorder(name, asked) for name in ("A", "B")}
    alternate(processes, parse_arguments(["--device=cpu", *flags]), end=end)
    return asked


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    directory = tmp_path / "photos"
    directory.mkdir()
    (directory / "a.jpg").write_bytes(jpeg_bytes(size=(90, 70)))
    return directory


def test_both_programs_pass_the_gate_and_are_measured(tmp_path, photos, capsys):
    out = tmp_path / "result.json"
    sizes = ["--batch-size=4", "--blocks=2", "--block-steps=2", "--warmup-steps=1", "--samples=64", "--short-side=64"]
    model = f"--model={write_tiny_model(tmp_path)}"
    assert main(["--device=cpu", model, *sizes, f"--photos={photos}", f"--directory={tmp_path}", f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["gate"]["difference"] <= 1e-5
    assert result["ratio"]["low"] <= result["ratio"]["value"] <= result["ratio"]["high"]
    for arm in result["arms"].values():
        assert 0 < arm["data_wait_share"] < 1
        assert arm["steps"] == 4
        assert min(arm["cpu_s_per_1000"], arm["loader_pss_mb"], arm["peak_gib"]) > 0
    assert "| tiny-vit, 4, fp32 | 1 |" in capsys.readouterr().out


def test_blocks_alternate_and_are_whole_rounds_of_the_workers():
    asked = _ask("--workers=3", "--blocks=2", "--block-steps=4", "--warmup-steps=1", end=float("inf"))
    assert [name for name, _ in asked] == ["A", "B", "A", "B", "B", "A"]
    assert [request["steps"] for _, request in asked[2:]] == [6, 6, 6, 6]


def test_warming_up_uses_up_what_was_loaded_ahead():
    asked = _ask("--workers=5", "--warmup-steps=1", "--blocks=1", end=float("inf"))
    assert [request["rewarm"] + request["steps"] for _, request in asked[:2]] == [12, 12]


def test_no_pair_of_blocks_begins_after_the_budget_but_two_are_measured():
    assert len(_ask("--blocks=6", end=0.0)) == 2 + 2 * 2


def test_only_the_steps_that_count_are_timed():
    numbers: list[Any] = []
    batches: Any = iter(range(100))
    block = measure(numbers.append, batches, steps=3, rewarm=2, device=CPU)
    assert numbers == [0, 1, 2, 3, 4]
    assert len(block["step_ms"]) == len(block["wait_ms"]) == 3
    assert all(wait <= step for wait, step in zip(block["wait_ms"], block["step_ms"], strict=True))


def test_a_rate_is_that_of_all_steps_of_a_block():
    block = {"step_ms": [10.0, 10.0, 100.0], "wait_ms": [0.0, 0.0, 90.0], "host_wait_ms": 90.0, "cpu_s": 0.3}
    arm = summarize([block, block], batch_size=4)
    assert arm["samples_per_s"] == 100.0
    assert arm["data_wait_share"] == 0.75
    assert arm["cpu_s_per_1000"] == 25.0


def test_the_gate_refuses_programs_that_compute_something_else():
    with pytest.raises(RuntimeError, match="losses on the same batch differ by 1.00e-01"):
        check_gate([1.0, 0.9], [1.0, 1.0], precision="fp32")
    assert check_gate([1.0, 0.99], [1.0, 1.0], precision="amp_bf16")["difference"] == pytest.approx(0.01)


def test_a_process_stands_still_between_requests_and_ends_with_its_block(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    with StoppedProcess("echo", paths=[str(tmp_path)]) as process:
        assert process.ask({"a": 1}) == {"a": 1}
        (pid,) = (child for child in process_tree(os.getpid()) if _is_echo(child))
        _wait_until(lambda: _state(pid) == "T")
        assert process.ask({"b": 2}) == {"b": 2}
    assert not Path(f"/proc/{pid}").exists()


def _is_echo(pid: int) -> bool:
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and path.read_text().split("\0")[1:3] == ["-m", "echo"]


def test_a_process_that_ends_instead_of_answering_is_reported(tmp_path):
    (tmp_path / "gone.py").write_text("raise SystemExit(3)\n")
    with (
        StoppedProcess("gone", paths=[str(tmp_path)]) as process,
        pytest.raises(RuntimeError, match="ended with status 3: see what it printed"),
    ):
        process.ask({})


def test_no_workers_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--workers=0"])
    assert "--workers 0: OpenCLIP's loader runs in the trainer then; give 1 or more" in capsys.readouterr().err


def test_a_folder_without_photos_is_refused(tmp_path, capsys):
    assert main(["--device=cpu", f"--photos={tmp_path}", f"--directory={tmp_path}"]) == 1
    assert "No photos to make shards of" in capsys.readouterr().err


def test_the_page_holds_the_results():
    text = end_to_end.PAGE.read_text()
    assert fill(text, {"end_to_end": table_of_results(end_to_end.RESULTS)}) == text


def test_a_row_names_what_was_switched_on(tmp_path):
    arm = dict.fromkeys(("samples_per_s", "samples_per_s_q25", "samples_per_s_q75", "data_wait_share"), 1.0)
    arm |= {"cpu_s_per_1000": 1.0, "peak_gib": 1.0}
    settings = vars(parse_arguments(["--device=cpu", "--decode=gpu", "--torchcompile"]))
    run = {"hardware": {"cpu": "C", "cores": 2}, "commit": "0123456789", "uncommitted_changes": False}
    run["open_clip"] = {"version": "4.0", "installed": False, "commit": "abcdef0123456"}
    result = {"settings": settings, "run": run, "ratio": {"value": 2, "low": 1, "high": 3}}
    (row,) = rows([{**result, "arms": {"clipyard": arm, "open_clip": arm}}])
    assert row[2] == "--decode gpu, --torchcompile"
    assert row[-3:] == ["C, 2 cores", "4.0-abcdef012", "012345678"]
