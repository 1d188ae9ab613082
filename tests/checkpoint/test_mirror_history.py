"""Whose history counts when a run goes on in another directory and comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.test_mirror import QUICK, mirror_of, remote_run, save, whole_steps
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import verify
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_fetch import fetch_newest
from training.checkpoint.mirror_history import History, fetch_history, merge_tags
from training.checkpoint.mirror_store import open_store
from training.checkpoint.tags import Best, Tags


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/away/run"


@pytest.fixture
def away(tmp_path: Path) -> Path:
    return tmp_path / "away" / "run"


@pytest.fixture
def first(tmp_path: Path, url: str) -> Path:
    """A's directory: mirrored up to step 20."""
    directory = tmp_path / "a" / "run"
    start(directory, "a1")
    save(directory, 10)
    save(directory, 20)
    log(directory, 10, 20)
    assert mirror_of(directory, url).upload_once()
    return directory


@pytest.fixture
def second(first: Path, tmp_path: Path, url: str) -> Path:
    """B's directory: went on from A's mirror to step 30."""
    directory = tmp_path / "b" / "run"
    bring(directory, url)
    start(directory, "b1")
    save(directory, 30)
    log(directory, 30)
    assert mirror_of(directory, url).upload_once()
    return directory


def start(run: Path, name: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"start": name}) + "\n")


def log(run: Path, *steps: int) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.writelines(json.dumps({"step": step, "by": run.parent.name}) + "\n" for step in steps)


def bring(run: Path, url: str) -> History:
    history = fetch_history(remote_run(url), run)
    fetch_newest(remote_run(url), run / "checkpoints")
    return history


def names(path: Path) -> list[str]:
    return [next(iter(json.loads(line).values())) for line in path.read_text().splitlines()]


def test_a_run_that_comes_back_goes_on_with_the_newer_history(first: Path, second: Path, away: Path, url: str) -> None:
    history = bring(first, url)
    start(first, "a2")
    mirror = mirror_of(first, url)
    mirror.check(continues=True)
    assert mirror.upload_once(), mirror.status
    assert names(away / "starts.jsonl") == ["a1", "b1", "a2"]
    assert names(away / "metrics.jsonl") == names(away / "events.jsonl") == [10, 20, 30]
    assert (away / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert history.aside is not None
    assert names(history.aside / "metrics.jsonl") == [10, 20]
    assert not list(away.glob("superseded*"))


def test_what_is_newer_here_stays(first: Path, url: str) -> None:
    start(first, "a2")
    log(first, 21)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert bring(first, url) == History([], None)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_a_log_that_continues_the_one_there_stays_although_checkpoints_are_lost(first: Path, url: str) -> None:
    log(first, 21)
    shutil.rmtree(first / "checkpoints")
    assert bring(first, url).aside is None
    assert names(first / "metrics.jsonl") == [10, 20, 21]


def test_a_directory_that_was_set_back_gets_the_newer_files(first: Path, tmp_path: Path, url: str) -> None:
    shutil.copytree(first, tmp_path / "backup")
    save(first, 30)
    log(first, 30)
    assert mirror_of(first, url).upload_once()
    bring(tmp_path / "backup", url)
    assert names(tmp_path / "backup" / "metrics.jsonl") == [10, 20, 30]


def test_no_start_and_no_event_is_lost_on_either_side(first: Path, second: Path, url: str) -> None:
    start(first, "a-before-it-saw-b")
    log(first, 25)
    bring(first, url)
    assert names(first / "starts.jsonl") == ["a1", "b1", "a-before-it-saw-b"]
    assert names(first / "events.jsonl") == [10, 20, 30, 25]
    assert names(first / "metrics.jsonl") == [10, 20, 30]
    assert mirror_of(first, url).upload_once()


def test_a_checkpoint_that_was_written_anew_elsewhere_gives_way(first: Path, second: Path, url: str) -> None:
    save(second, 20, value=7)
    assert mirror_of(second, url).upload_once()
    expected = verify(second / "checkpoints" / "step_00000020")
    history = bring(first, url)
    assert history.aside is not None
    verify(history.aside / "checkpoints" / "step_00000020")
    assert mirror_of(first, url).upload_once()
    assert remote_run(url).manifest(20) == expected
    assert whole_steps(url) == [10, 20, 30]


def test_an_epoch_file_that_was_written_anew_elsewhere_gives_way(first: Path, tmp_path: Path, away: Path) -> None:
    url = f"file://{away}"
    (first / "checkpoints" / "epoch_1.pt").write_bytes(b"a")
    assert mirror_of(first, url).upload_once()
    other = tmp_path / "b" / "run"
    bring(other, url)
    start(other, "b1")
    (other / "checkpoints" / "epoch_1.pt").write_bytes(b"later")
    assert mirror_of(other, url).upload_once()
    history = bring(first, url)
    assert history.aside is not None
    assert (history.aside / "checkpoints" / "epoch_1.pt").read_bytes() == b"a"
    (first / "checkpoints" / "epoch_2.pt").write_bytes(b"a")
    for _ in range(2):
        assert mirror_of(first, url).upload_once()
    assert (away / "checkpoints" / "epoch_1.pt").read_bytes() == b"later"


def test_what_was_found_suspect_elsewhere_is_suspect_here(first: Path, second: Path, url: str) -> None:
    Checkpointer(first / "checkpoints").change_tags(lambda _: Tags().with_good(10))
    Checkpointer(second / "checkpoints").change_tags(lambda tags: tags.with_suspect([30]))
    assert mirror_of(second, url).upload_once()
    bring(first, url)
    assert Checkpointer(first / "checkpoints").tags() == Tags(frozenset({10}), frozenset({30}))
    newest = fetch_newest(remote_run(url), first / "checkpoints")
    assert newest == first / "checkpoints" / "step_00000020"


def test_tags_of_checkpoints_that_gave_way_count_no_more() -> None:
    here = Tags(frozenset({10, 20}), frozenset({30, 40}), Best("top1", 30, 0.5))
    there = Tags(frozenset({30}), frozenset({20}))
    assert merge_tags(there=there, here=here, steps=[10, 20, 40]) == Tags(frozenset({10, 30}), frozenset({20, 40}))


def test_a_mark_of_a_checkpoint_that_is_only_there_counts(first: Path, url: str) -> None:
    Checkpointer(first / "checkpoints").change_tags(lambda tags: tags.with_suspect([20]))
    assert mirror_of(first, url).upload_once()
    Checkpointer(first / "checkpoints").change_tags(lambda _: Tags().with_good(10))
    shutil.rmtree(first / "checkpoints" / "step_00000020")
    newest = fetch_newest(remote_run(url), first / "checkpoints")
    assert newest == first / "checkpoints" / "step_00000010"


def test_a_directory_that_does_not_know_all_starts_overwrites_nothing(
    first: Path, second: Path, away: Path, url: str
) -> None:
    before = {path: path.read_bytes() for path in away.rglob("*") if path.is_file()}
    start(first, "a2")
    log(first, 40)
    mirror = mirror_of(first, url)
    with pytest.raises(ValueError, match="--remote-sync: .* has starts that .* does not know"):
        mirror.check(continues=True)
    assert not mirror.upload_once()
    assert mirror.status.refused == 1
    assert {path: path.read_bytes() for path in away.rglob("*") if path.is_file()} == before


def test_events_that_are_only_there_are_not_overwritten(
    first: Path, away: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    (first / "events.jsonl").write_text('{"step": 50}\n')
    (first / ".mirror.json").unlink()
    mirror = mirror_of(first, url)
    assert not mirror.upload_once()
    assert "has lines that" in caplog.text
    assert names(away / "events.jsonl") == [10, 20]


def test_what_an_attempt_without_a_checkpoint_has_left_is_no_history(tmp_path: Path, url: str, away: Path) -> None:
    start(tmp_path / "attempt", "one")
    assert mirror_of(tmp_path / "attempt", url).upload_once()
    start(tmp_path / "run", "two")
    mirror = Mirror(tmp_path / "run", open_store(url, options=QUICK), options=QUICK)
    mirror.check(continues=False)
    assert mirror.upload_once()
    assert names(away / "starts.jsonl") == ["two"]
