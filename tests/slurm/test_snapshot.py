"""The code that a job runs: copied once, found before what lies in the working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.snapshot import PACKAGES, SNAPSHOT_NAME, code_digest, snapshot_digest, take_snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkout."""
    for package in PACKAGES:
        directory = tmp_path / "source" / package
        (directory / "__pycache__").mkdir(parents=True)
        (directory / "__init__.py").write_text(f"NAME = '{package}'\n")
        (directory / "__pycache__" / "old.pyc").write_bytes(b"x")
    (tmp_path / "source" / "configs" / "a.json").write_text("{}")
    return tmp_path / "source"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


def test_the_packages_are_copied_with_their_data_and_without_byte_code(source, run):
    digest = take_snapshot(run, source=source)
    files = {path.relative_to(run / "code").as_posix() for path in (run / "code").rglob("*") if path.is_file()}
    assert files == {SNAPSHOT_NAME, "configs/a.json", *(f"{package}/__init__.py" for package in PACKAGES)}
    assert snapshot_digest(run) == digest == code_digest(source)


def test_equal_code_is_left_as_it_is_and_other_code_replaces_it_as_a_whole(source, run):
    take_snapshot(run, source=source)
    (run / "code" / "mark").touch()
    take_snapshot(run, source=source)
    assert (run / "code" / "mark").exists()
    (source / "models" / "new.py").write_text("")
    take_snapshot(run, source=source)
    assert not (run / "code" / "mark").exists()
    assert (run / "code" / "models" / "new.py").exists()
    assert sorted(path.name for path in run.iterdir()) == ["code"]


def test_the_digest_is_of_names_and_contents_only(source):
    before = code_digest(source)
    (source / "models" / "__pycache__" / "new.pyc").write_bytes(b"y")
    os.utime(source / "models" / "__init__.py", (0, 0))
    assert code_digest(source) == before
    (source / "models" / "__init__.py").rename(source / "models" / "other.py")
    assert code_digest(source) != before


def test_a_snapshot_that_was_cut_short_is_none(source, run):
    take_snapshot(run, source=source)
    (run / "code" / SNAPSHOT_NAME).write_text('{"dig')
    assert snapshot_digest(run) is None
    assert snapshot_digest(run / "nowhere") is None


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(source, run):
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "--quiet"], ["add", "configs/a.json"], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    take_snapshot(run, source=source)
    commit = json.loads((run / "code" / SNAPSHOT_NAME).read_text())["commit"]
    assert len(commit) == 41
    assert commit.endswith("+")


def test_a_job_finds_the_snapshot_before_the_code_in_its_working_directory(source, run):
    take_snapshot(run, source=source)
    (source / "models" / "__init__.py").write_text("NAME = 'edited meanwhile'\n")
    environment = {**os.environ, "PYTHONPATH": str(run / "code"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", "import models; print(models.NAME)"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "models\n"
