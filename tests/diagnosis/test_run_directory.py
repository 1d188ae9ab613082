"""The run directory as several nodes see it."""

from __future__ import annotations

from pathlib import Path

from training.diagnosis import run_directory
from training.diagnosis.findings import Level
from training.diagnosis.run_directory import RunDirectory, file_system_of, neighbours


def test_what_is_written_is_read_seen_by_others_and_removed(tmp_path: Path):
    one, other = (RunDirectory(tmp_path / "run", token="t", node=node) for node in ("a", "b"))
    (finding,), (rate,) = one.write_and_read()
    assert (finding.level in (Level.OK, Level.WARNING), rate.unit) == (True, "MB/s")
    other.write_and_read()
    assert one.look_for(["b"]) == {"b": True}
    one.clean_up()
    other.clean_up()
    assert list((tmp_path / "run").iterdir()) == []


def test_files_of_another_directory_or_examination_are_not_seen(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_directory, "_PATIENCE_S", 0.2)
    RunDirectory(tmp_path, token="earlier", node="b").write_and_read()
    assert RunDirectory(tmp_path, token="t", node="a").look_for(["b"]) == {"b": False}


def test_a_directory_that_cannot_be_written_is_bad_for_all(tmp_path: Path):
    (tmp_path / "file").touch()
    (finding,), rates = RunDirectory(tmp_path / "file", token="t", node="a").write_and_read()
    assert (finding.level, finding.shared, rates) == (Level.BAD, True, [])
    assert "cannot be written (Not a directory): make it writable" in finding.text


def test_the_innermost_mount_says_which_file_system_it_is(tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda / ext4 rw 0 0\nserver:/p /p lustre rw 0 0\nnone /p/my\\040own tmpfs rw 0 0\n")
    for path, kind in (("/p/logs/run", "lustre"), ("/p/my own/x", "tmpfs"), ("/pp", "ext4")):
        assert file_system_of(Path(path), mounts=mounts) == kind
    assert file_system_of(Path("/p"), mounts=tmp_path / "none") == ""


def test_each_node_looks_for_some_others_and_together_they_see_all():
    nodes = [f"n{number}" for number in range(128)]
    assert neighbours("n5", nodes) == ["n0", *(f"n{number}" for number in range(6, 14))]
    assert neighbours("n127", nodes)[:2] == ["n0", "n1"]
    assert neighbours("a", ["a"]) == []
