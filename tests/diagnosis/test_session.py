"""Several nodes are examined together: real processes, a real store, real all-reduces."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.diagnosis.jobs import (
    Examined,
    as_slurm_step,
    corrupts_sums,
    examine_nodes,
    hangs_in_a_check,
    has_broken_links,
    never_arrives,
)
from training.diagnosis.complaints import clear_complaints, complain, complaining_after, read_complaints
from training.diagnosis.examine import Member, Team
from training.diagnosis.session import find_absent, find_place

THREE = ["a", "b", "c"]


def suspects(directory: Path) -> dict[str, str]:
    path = directory / "run" / "bad_nodes.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["node"]: record["reason"] for record in map(json.loads, lines)}


def assert_only_c_is_excluded(examined: Examined, directory: Path, reason: str) -> None:
    assert examined.verdict["exclude"] == ["c"], examined.text + examined.errors
    assert (examined.codes[0], examined.codes[1]) == (95, 0)
    assert "Exclude 1 of 3: --exclude=c" in examined.text
    assert suspects(directory).keys() == {"c"}
    assert reason in suspects(directory)["c"]


def test_two_good_nodes_of_two_ranks_are_measured_and_let_through(tmp_path: Path):
    examined = examine_nodes(["a", "a", "b", "b"], tmp_path)
    assert examined.codes == [0, 0, 0, 0]
    assert "All 2 node(s) can be trained on." in examined.text
    reports = examined.verdict["reports"]
    assert [report["leads"] for report in reports] == [True, False, True, False]
    rates = {rate["check"] for rate in reports[0]["rates"]}
    assert {"compute", "run directory", "all-reduce in the node"} <= rates
    assert reports[0]["pairs"]["b"] > 0
    assert abs(reports[2]["clock"]["offset_s"]) < 1
    assert not list((tmp_path / "run").glob(".doctor-*"))


def test_the_node_that_sees_another_run_directory_is_excluded(tmp_path: Path):
    """As where a mount is missing: node c writes to its own disk under the same name."""
    elsewhere = tmp_path / "elsewhere" / "c"
    elsewhere.mkdir(parents=True)
    for node in THREE:
        (tmp_path / f"mount-{node}").symlink_to(tmp_path / "run" if node != "c" else elsewhere)
    (tmp_path / "run").mkdir()
    examined = examine_nodes(THREE, tmp_path, f"--run={tmp_path}/mount-NODE")
    assert_only_c_is_excluded(examined, tmp_path, "run directory: does not hold what the other nodes write into it")


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (has_broken_links, "all-reduce across nodes: failed with each of"),
        (corrupts_sums, "all-reduce across nodes: failed with each of"),
        (hangs_in_a_check, "machine: no answer within 2 s: what it asks hangs on this node"),
    ],
)
def test_the_node_with_a_fault_is_excluded_and_its_partners_are_not(tmp_path: Path, trouble, reason: str):
    assert_only_c_is_excluded(examine_nodes(THREE, tmp_path, trouble=trouble), tmp_path, reason)


def test_a_rank_that_never_arrives_is_named_and_the_others_are_examined(tmp_path: Path):
    examined = examine_nodes(THREE, tmp_path, "--arrival-limit=3", trouble=never_arrives)
    assert examined.codes[:2] == [0, 0]
    assert "presence: rank(s) 2 did not come in time; on which nodes they are is not known" in examined.text
    assert examined.verdict["reports"][1]["pairs"]["a"] > 0


TEAM = Team((Member(0, "a", 0, "cuda"), Member(1, "a", 1, "cuda"), Member(2, "b", 0, "cuda"), Member(3, "b", 1, "cpu")))


def test_with_slurms_node_list_whoever_is_missing_has_a_name():
    expected = {"a": 2, "b": 2, "c": 2}
    (absent,) = find_absent(6, TEAM, {0, 1, 2, 3}, expected=expected)
    assert (absent.node, absent.why) == ("c", "none of its ranks came in time")
    (absent,) = find_absent(5, Team(TEAM.members[:3]), {0, 1, 2}, expected={"a": 2, "b": 2})
    assert (absent.node, absent.why) == ("b", "only 1 of its 2 ranks came in time")
    (absent,) = find_absent(4, TEAM, {0, 1, 3}, expected={"a": 2, "b": 2})
    assert (absent.node, absent.ranks, absent.why) == ("b", (2,), "came, and gave no report in time")


def test_who_is_reached_by_nobody_does_not_call_all_others_missing():
    alone, expected = Team(TEAM.members[:2]), dict.fromkeys("abcd", 2)
    (absent,) = find_absent(8, alone, {0, 1}, expected=expected, complaining={"b", "c"})
    assert absent.node == "a"
    assert absent.why == "2 of the other 3 nodes say that they do not reach it: its network is broken"


def test_who_is_only_the_first_to_come_is_not_to_blame_for_it():
    alone, expected = Team(TEAM.members[:2]), dict.fromkeys("abcd", 2)
    for complaining in (set(), {"b"}):
        absent = find_absent(8, alone, {0, 1}, expected=expected, complaining=complaining)
        assert [missing.node for missing in absent] == ["b", "c", "d"]


def test_a_punctual_node_is_let_through_and_nobody_is_excluded_for_being_late(tmp_path: Path):
    examined = examine_nodes(THREE, tmp_path, "--arrival-limit=3", trouble=only_a_arrives)
    assert examined.codes[0] == 0, examined.text + examined.errors
    assert (examined.verdict["exclude"], suspects(tmp_path)) == ([], {})
    assert "look  b,c  presence: none of its ranks came in time" in examined.text
    assert "Nobody is blamed for who is missing: training waits longer for them." in examined.text


def only_a_arrives(node: str) -> None:
    as_slurm_step(node)
    if node != "a":
        os._exit(0)


def test_a_complaint_is_heard_in_its_own_start_and_taken_back_on_success(tmp_path: Path):
    with complaining_after(0.05, tmp_path, node="b", identity="job 1"):
        while not read_complaints(tmp_path, "job 1"):
            time.sleep(0.01)
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())
    complain(tmp_path, "b", "job 1")
    complain(tmp_path, "c", "job 2")
    assert (read_complaints(tmp_path, "job 1"), read_complaints(tmp_path, "job 2")) == ({"b"}, {"c"})
    clear_complaints(tmp_path)
    assert read_complaints(tmp_path, "job 1") == set()


def test_whom_the_others_do_not_reach_is_excluded_by_their_word(tmp_path: Path):
    examined = examine_nodes(THREE, tmp_path, "--arrival-limit=6", trouble=nobody_reaches_a)
    assert examined.codes == [95, 0, 0], examined.text + examined.errors
    assert "2 of the other 2 nodes say that they do not reach it" in suspects(tmp_path)["a"]
    assert not list((tmp_path / "run").glob(".doctor-*"))


def nobody_reaches_a(node: str) -> None:
    as_slurm_step(node)
    if node != "a":
        os.environ["MASTER_PORT"] = "9"  # discard


def test_a_rank_0_that_cannot_listen_gives_no_verdict(tmp_path: Path):
    examined = examine_nodes(THREE, tmp_path, "--arrival-limit=1", trouble=has_no_name)
    assert examined.codes == [1, 0, 0]
    assert "rank 0 cannot listen at no-such-host.invalid" in examined.errors


def has_no_name(node: str) -> None:
    os.environ["MASTER_ADDR"] = "no-such-host.invalid"


def test_a_rank_without_the_others_device_takes_no_part_in_what_they_measure():
    assert TEAM.measured_ranks() == [0, 1, 2]
    assert TEAM.measured_ranks("b") == [2]
    assert [rank for rank in range(4) if TEAM.leads(rank)] == [0, 2]


def test_a_shell_within_a_job_is_one_process():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert find_place(batch).world_size == 1
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    lists = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NUM_TASKS": "8"}
    assert tuple(find_place(batch | step | lists)) == (3, 1, 8)


def stop_itself(node: str) -> None:
    if node == "c":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_at_its_start_does_not_stop_the_others(tmp_path: Path):
    examined = examine_nodes(THREE, tmp_path, "--arrival-limit=3", trouble=stop_itself)
    assert examined.codes == [0, 0, -signal.SIGKILL]
    assert "rank(s) 2 did not come in time" in examined.text
