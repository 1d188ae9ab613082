"""The console script: one table, honest exit codes, no torch until a command needs it."""

from __future__ import annotations

import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from training.commands.main import COMMANDS, find_command, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: clipyard COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_the_nearest_one(capsys):
    assert main(["make-demo-date"]) == 2
    assert "did you mean make-demo-data?" in capsys.readouterr().err


def test_a_command_like_no_other_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown command 'zzz': Commands: train, "):
        find_command("zzz")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_of_the_table_names_a_module(name):
    assert find_spec(COMMANDS[name].module) is not None


def test_the_exit_code_of_a_command_is_handed_on(tmp_path, capsys):
    assert main(["demo-result", str(tmp_path / "no-such-run")]) == 1
    assert "no-such-run" in capsys.readouterr().err


@pytest.fixture
def demo_run(tmp_path: Path) -> Path:
    """The files of a finished run that demo-result reads, with sets of 4 classes and 20 images."""
    (tmp_path / "zs").mkdir()
    (tmp_path / "zs" / "classnames.txt").write_text("red square\nblue square\nred disc\nblue disc\n")
    (tmp_path / "pairs" / "test").mkdir(parents=True)
    with tarfile.open(tmp_path / "pairs" / "test" / "0.tar", "w") as tar:
        for number in range(20):
            tar.addfile(tarfile.TarInfo(f"{number}.jpg"))
            tar.addfile(tarfile.TarInfo(f"{number}.txt"))
    run = tmp_path / "logs" / "demo"
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.txt").write_text(f"zeroshot_data: {tmp_path / 'zs'}\nretrieval_data: {tmp_path / 'pairs'}\n")
    lines = [
        {"zs-zeroshot-top1": 0.26, "pairs-image_retrieval_recall@5": 0.25, "clip_val_loss": 4.2, "epoch": 0},
        {"zs-zeroshot-top1": 0.75, "pairs-image_retrieval_recall@5": 0.9, "clip_val_loss": 1.5, "epoch": 3},
    ]
    (run / "checkpoints" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_demo_result_shows_before_after_and_chance(demo_run, capsys):
    assert main(["demo-result", str(demo_run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["zero-shot", "top-1", "(zs)", "26.0", "%", "75.0", "%", "25.0", "%"] in rows
    assert ["image", "found", "by", "text,", "R@5", "(pairs)", "25.0", "%", "90.0", "%", "25.0", "%"] in rows
    assert ["validation", "loss", "4.200", "1.500", "-"] in rows


def test_models_without_a_pattern_lists_names(capsys):
    assert main(["models"]) == 0
    assert "ViT-B-32" in capsys.readouterr().out.splitlines()


def test_models_with_a_pattern_tells_size_and_cost(capsys):
    assert main(["models", "vit-b-32-256"]) == 0
    cells = capsys.readouterr().out.splitlines()[1].split()
    assert cells == ["ViT-B-32-256", "256", "77", "87.9", "63.4", "151.3", "5.75", "2.98"]


def test_models_refuses_a_pattern_that_matches_nothing(capsys):
    assert main(["models", "no-such-model"]) == 1
    assert "no model matches 'no-such-model'" in capsys.readouterr().err
