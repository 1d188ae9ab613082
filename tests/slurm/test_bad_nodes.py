"""Which nodes are suspected, for how long, and which of them a job can do without."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slurm.bad_nodes import Suspect, blame, choose_excluded, main, read_suspects, record_suspects, usable_nodes

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NODES = ["n1", "n2", "n3", "n4"]


def suspects(*nodes: str) -> list[Suspect]:
    return [Suspect(node, "hang", NOW) for node in nodes]


def test_a_suspicion_lasts_a_day_and_the_newest_of_a_node_counts(tmp_path: Path) -> None:
    path = tmp_path / "bad_nodes.jsonl"
    record_suspects(path, [("old", "hang")], time=NOW - timedelta(hours=25))
    record_suspects(path, [("twice", "first"), ("n7", "no GPU")], time=NOW - timedelta(hours=23))
    record_suspects(path, [("twice", "second")], time=NOW - timedelta(hours=1))
    assert [(s.node, s.reason) for s in read_suspects(path, now=NOW)] == [("twice", "second"), ("n7", "no GPU")]
    assert read_suspects(tmp_path / "none.jsonl") == []


def test_a_line_that_a_crash_cut_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "bad_nodes.jsonl"
    path.write_text('{"node": "n1", "rea')
    record_suspects(path, [("n2", "hang")], time=NOW)
    path.open("a").write('{"node": "n3"}\n[]\n{"node": "n4", "reason": "x", "time": "2026-03-01T12:00:00"}\n')
    assert [suspect.node for suspect in read_suspects(path, now=NOW)] == ["n2"]


@pytest.mark.parametrize(
    ("usable", "needed", "always", "expected"),
    [
        (NODES, 2, [], ["n4", "n3"]),
        (NODES, 3, [], ["n4"]),  # the newest
        (NODES, 4, [], []),
        (NODES, 3, ["n1"], []),  # what the user excludes is no help
        (NODES, 2, ["n4"], ["n4", "n3"]),  # and is not counted twice
        (["n1", "n2", "n3"], 2, [], ["n4", "n3"]),  # a node that is down costs nothing
        (None, 4, [], ["n4", "n3"]),
    ],
)
def test_a_job_excludes_as_many_as_it_can_do_without(usable, needed, always, expected) -> None:
    assert choose_excluded(suspects("n4", "n3"), usable=usable, needed=needed, always=always) == expected


def _failed(run: Path, words: str, *, rank: int = 5, log: str = "out.log", prefix: str = "") -> None:
    (run / log).parent.mkdir(parents=True, exist_ok=True)
    stamp = NOW.astimezone().strftime("%Y-%m-%d,%H:%M:%S")
    (run / log).open("a").write(f"{prefix}{stamp} | CRITICAL | rank {rank} failed first: {words}\nand more\n")


def _blamed(run: Path, *, since: datetime = NOW, messages: str = "") -> dict[str, str]:
    return dict(blame(run, NODES, tasks=4, since=since, messages=messages))


def test_the_node_of_a_rank_that_hung_is_blamed(tmp_path: Path) -> None:
    _failed(tmp_path, "hang: rank 5 (process 7 on x) has made no progress for 600 s after step 7")
    assert list(_blamed(tmp_path)) == ["n2"]
    assert _blamed(tmp_path, since=NOW + timedelta(seconds=1)) == {}, "that was an earlier start"


def test_where_rank_0_is_silent_the_others_have_said_it(tmp_path: Path) -> None:
    _failed(tmp_path, "", rank=0, log="slurm/rank-00000.log")
    words = "hang: rank 0, or the launcher on its node, is silent since step 7: stopped"
    _failed(tmp_path, words, rank=0, log="slurm/rank-00001.log", prefix="rank 1 | ")
    assert list(_blamed(tmp_path)) == ["n1"]


def test_a_broken_device_is_no_ordinary_crash(tmp_path: Path) -> None:
    _failed(tmp_path, "\nTraceback ...\nRuntimeError: CUDA error: uncorrectable ECC error encountered", rank=15)
    assert list(_blamed(tmp_path)) == ["n4"]
    _failed(tmp_path, "\nTraceback ...\nValueError: 3 is not 4", rank=15)
    assert _blamed(tmp_path) == {}


@pytest.mark.parametrize(("ranks", "expected"), [([9], ["n3"]), (list(range(16)), [])])
def test_ranks_that_differ_from_the_others_are_blamed_unless_all_do(tmp_path: Path, ranks, expected) -> None:
    event = {"step": 7, "time": NOW.isoformat(timespec="seconds"), "event": "replicas differ", "ranks": ranks}
    (tmp_path / "events.jsonl").write_text(f"torn\n{json.dumps(event)}\n")
    assert list(_blamed(tmp_path)) == expected


def test_a_node_that_cannot_start_tasks_is_blamed(tmp_path: Path) -> None:
    line = "srun: error: Task launch for StepId=7.0 failed on node {}: {}\n"
    messages = line.format("n3", "Communication connection failure") + line.format("n4", "Job credential revoked")
    assert list(_blamed(tmp_path, messages=messages)) == ["n3"]


def test_the_command_records_whom_it_blames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _failed(tmp_path, "hang: rank 5 (process 7 on x) has made no progress for 600 s after step 7")
    where = ["--nodes", ",".join(NODES), "--tasks-per-node", "4"]
    assert main(["blame", str(tmp_path), *where, "--since", str(NOW.timestamp())]) == 0
    assert capsys.readouterr().out == "n2\n"
    assert read_suspects(tmp_path / "bad_nodes.jsonl")[0].node == "n2"
    line = ["exclude", str(tmp_path), "--partition", "none", "--needed", "2", "--always", "m[1-2]"]
    assert main(line) == 0
    assert capsys.readouterr().out == "m1,m2,n2\n"


def test_a_node_that_is_asleep_or_promised_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up = ["idle", "idle~", "idle#", "idle%", "idle^", "idle@", "mixed-", "planned", "allocated", "allocated+"]
    down = ["idle*", "idle$", "down~", "down*", "drained", "draining@", "maint", "unknown"]
    listed = [f"{state[0]}{number} {state}" for number, state in enumerate(up + down)]
    (tmp_path / "sinfo").write_text("#!/bin/sh\ncat <<'END'\n{}\nEND\n".format("\n".join(listed)))
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert usable_nodes("gpu") == {line.split()[0] for line in listed[: len(up)]}
