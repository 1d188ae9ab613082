"""The console script: one table, honest exit codes, no torch until a command needs it."""

from __future__ import annotations

from importlib.util import find_spec

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


def test_the_exit_code_of_a_command_is_handed_on(monkeypatch, tmp_path, capsys):
    assert main(["demo-result", str(tmp_path / "no-such-run")]) == 1
    assert "no-such-run" in capsys.readouterr().err
