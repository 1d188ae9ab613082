"""Verdicts over fleets that are made up: the one bad node of 128 is found, and good ones are left in peace."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from training.diagnosis.findings import ClockReading, Level, RankReport, Rate, bad, warning
from training.diagnosis.judge import Absent, Diagnosis, judge
from training.diagnosis.pairing import pairings
from training.diagnosis.table import render

H100 = "NVIDIA H100, bfloat16"
NODES = [f"jwb{number:04d}" for number in range(128)]


def report(node: str, *, tflops: float = 700.0, gpus: int = 4, **fields: object) -> RankReport:
    rates = tuple(Rate("compute", tflops, "TFLOP/s", H100, f"GPU {gpu}") for gpu in range(gpus))
    return replace(RankReport(0, node, rates=rates, backend="nccl", facts={"torch": "2.15.0"}), **fields)


def fleet(**odd: RankReport) -> list[RankReport]:
    """128 good nodes with the noise of real ones; ``odd`` takes the places of some."""
    chance = random.Random(0)
    return [odd.get(node, report(node, tflops=700 * chance.uniform(0.96, 1.04))) for node in NODES]


def reasons(diagnosis: Diagnosis, node: str) -> str:
    return next(verdict.reasons for verdict in diagnosis.nodes if verdict.node == node)


def test_a_good_fleet_has_no_node_to_exclude():
    diagnosis = judge(fleet())
    assert (diagnosis.exclude, diagnosis.job, diagnosis.exit_code) == ((), (), 0)
    assert "All 128 node(s) can be trained on." in render(diagnosis, fleet())


def test_the_one_slow_gpu_of_512_is_found_with_its_place():
    slow = report("jwb0042")
    slow = replace(slow, rates=(*slow.rates[:3], replace(slow.rates[3], value=560.0)))
    diagnosis = judge(fleet(jwb0042=slow))
    assert (diagnosis.exclude, diagnosis.exit_code) == (("jwb0042",), 95)
    assert "compute: GPU 3: 560 TFLOP/s, the others" in reasons(diagnosis, "jwb0042")
    assert "Exclude 1 of 128: --exclude=jwb0042" in render(diagnosis, fleet(jwb0042=slow))


def test_a_little_slower_is_worth_a_look_and_stays():
    diagnosis = judge(fleet(jwb0042=report("jwb0042", tflops=620)))
    assert diagnosis.exclude == ()
    assert next(verdict.level for verdict in diagnosis.nodes if verdict.node == "jwb0042") is Level.WARNING


def test_other_devices_are_not_compared_and_cpus_are_not_judged():
    small = Rate("compute", 300.0, "TFLOP/s", "NVIDIA A100, bfloat16")
    assert judge(fleet(jwb0042=report("jwb0042", rates=(small,)))).exit_code == 0
    cpus = [report(f"n{place}", rates=(Rate("compute", speed, "TFLOP/s", "CPU, float32"),))
            for place, speed in enumerate((1.0, 1.0, 0.1))]  # fmt: skip
    assert judge(cpus).exit_code == 0


def test_the_node_with_the_broken_network_is_found_by_its_partners():
    broken = "jwb0007"
    pairs: dict[str, dict[str, float | None]] = {node: {} for node in NODES}
    for dealt in pairings(NODES, rounds=3):
        for one, other in dealt:
            rate = None if broken in (one, other) else 180.0
            pairs[one][other] = pairs[other][one] = rate
    diagnosis = judge([report(node, pairs=pairs[node]) for node in NODES])
    assert diagnosis.exclude == (broken,)
    assert "failed with each of" in reasons(diagnosis, broken)


@pytest.mark.parametrize(("rate", "excluded"), [(80.0, True), (130.0, False)])
def test_a_node_is_as_fast_as_with_its_best_partner(rate: float, excluded: bool):
    pairs = {node: {f"{node}x": 180.0, f"{node}y": 60.0} for node in NODES} | {"jwb0007": {"a": rate, "b": 60.0}}
    assert (judge([report(node, pairs=pairs[node]) for node in NODES]).exclude == ("jwb0007",)) is excluded


def test_of_two_nodes_that_cannot_reach_each_other_both_are_suspected():
    diagnosis = judge([report("a", pairs={"b": None}), report("b", pairs={"a": None})])
    assert diagnosis.exclude == ("a", "b")
    assert "the network of one of the two" in reasons(diagnosis, "a")


def test_an_old_version_is_named_and_a_tie_is_the_jobs_trouble():
    diagnosis = judge(fleet(jwb0042=report("jwb0042", facts={"torch": "2.11.0"})))
    assert diagnosis.exclude == ("jwb0042",)
    assert "torch: 2.11.0, but 2.15.0 on 127 other node(s)" in reasons(diagnosis, "jwb0042")
    two = judge([report("a"), report("b", facts={"torch": "2.11.0"})])
    assert (two.exclude, two.exit_code) == ((), 2)
    assert "which of them is right cannot be told" in two.job[0].text
    assert judge([report("a", facts={"kernel": "6.1"}), report("b", facts={"kernel": "6.2"})]).exit_code == 0


def test_clocks_are_compared_with_the_middle_of_all_not_with_the_first():
    readings = {node: ClockReading(30.0, 0.001, True) for node in NODES} | {NODES[0]: ClockReading(0.0, 0.0, True)}
    diagnosis = judge([report(node, clock=readings[node]) for node in NODES])
    assert diagnosis.exclude == (NODES[0],)
    assert "-30000.0 ms from the middle of all: restart its time service" in reasons(diagnosis, NODES[0])


@pytest.mark.parametrize(("kept", "excluded"), [(True, ("b",)), (False, ())])
def test_of_two_clocks_the_wrong_one_is_known_only_if_nobody_keeps_it(kept: bool, excluded: tuple[str, ...]):
    clocks = {"a": ClockReading(0.0, 0.001, kept), "b": ClockReading(-60.0, 0.001, False)}
    diagnosis = judge([report(node, clock=clock) for node, clock in clocks.items()])
    assert diagnosis.exclude == excluded
    text = " ".join(finding.text for verdict in diagnosis.nodes for finding in verdict.findings)
    assert ("which of the two is wrong cannot be told" in text) is not kept


def test_a_clock_that_cannot_be_read_exactly_is_not_called_wrong():
    readings = [ClockReading(offset, error, True) for offset, error in ((0.0, 0.0), (0.001, 0.0), (0.6, 0.5))]
    assert all(
        verdict.level is Level.OK
        for verdict in judge([report(f"n{place}", clock=clock) for place, clock in enumerate(readings)]).nodes
    )


def sighted(node: str, others: dict[str, bool], file_system: str = "lustre") -> RankReport:
    return report(node, seen=others, file_system=file_system)


def test_the_node_whose_run_directory_is_another_one_is_found():
    seen = {node: {other: node != "c" and other != "c" for other in "abcd" if other != node} for node in "abcd"}
    diagnosis = judge([sighted(node, seen[node], "ext4" if node == "c" else "lustre") for node in "abcd"])
    assert diagnosis.exclude == ("c",)
    assert "it is on ext4 there" in reasons(diagnosis, "c")


def test_nobody_sees_anybody_is_the_jobs_trouble_unless_one_lies_in_memory():
    apart = [sighted("a", {"b": False}, "ext4"), sighted("b", {"a": False}, "ext4")]
    assert (judge(apart).exclude, judge(apart).exit_code) == ((), 2)
    assert "pass --logs with a directory that all nodes share" in judge(apart).job[0].text
    apart[1] = sighted("b", {"a": False}, "tmpfs")
    assert judge(apart).exclude == ("b",)


def test_what_is_wrong_everywhere_is_no_nodes_fault():
    denied = (bad("shards", "access denied", shared=True),)
    diagnosis = judge([report(node, findings=denied) for node in NODES])
    assert (diagnosis.exclude, diagnosis.exit_code) == ((), 2)
    assert diagnosis.job[0].text == "access denied (on all nodes)"
    assert judge(fleet(jwb0042=report("jwb0042", findings=denied))).exclude == ("jwb0042",)


def test_most_nodes_are_never_excluded_at_once():
    ecc = (bad("GPU memory errors", "5 uncorrected"),)
    diagnosis = judge([report(node, findings=ecc if node in "abc" else ()) for node in "abcd"])
    assert (diagnosis.exclude, diagnosis.exit_code) == ((), 2)
    assert "3 of 4 nodes are bad: look for what they share" in diagnosis.job[0].text
    assert judge([report("a", findings=ecc)]).exit_code == 95


def test_a_node_that_did_not_come_is_excluded_and_unknown_ranks_are_said():
    gone = judge(fleet()[:-1], absent=[Absent("jwb0127", (), "none of its ranks came in time")])
    assert gone.exclude == ("jwb0127",)
    assert "presence: none of its ranks came in time" in reasons(gone, "jwb0127")
    nobody = judge([report("a")], absent=[Absent("", tuple(range(4, 40)), "did not come")])
    assert (nobody.exclude, nobody.exit_code) == ((), 0)
    assert "rank(s) 4, 5, " in nobody.job[0].text


@pytest.mark.parametrize(
    ("came", "missing", "excluded"),
    [(3, 5, False), (5, 3, False), (1, 7, False), (2, 2, False), (6, 2, True), (1, 1, True), (2, 1, True)],
)
def test_many_that_are_late_are_no_reason_to_exclude_anybody(came: int, missing: int, excluded: bool):
    reports = [report(node) for node in NODES[:came]]
    late = NODES[came : came + missing]
    diagnosis = judge(reports, absent=[Absent(node, (), "none of its ranks came in time") for node in late])
    assert diagnosis.exclude == (tuple(late) if excluded else ())
    assert diagnosis.exit_code == (95 if excluded else 0)
    assert ("can be trained on" in render(diagnosis, reports), "training waits" in render(diagnosis, reports)) == (
        False,
        not excluded,
    )


def test_what_is_broken_is_excluded_although_many_are_late():
    broken = report(NODES[0], findings=(bad("GPU memory errors", "5 uncorrected"),))
    absent = [Absent(node, (), "none of its ranks came in time") for node in NODES[5:8]]
    assert judge([broken, *map(report, NODES[1:5])], absent=absent).exclude == (NODES[0],)


def test_the_table_says_the_same_thing_once():
    reports = fleet(**{node: report(node, findings=(warning("load", "9.0 on 4 CPUs"),)) for node in NODES[:64]})
    lines = render(judge(reports), reports).splitlines()
    assert [line for line in lines if "9.0 on 4 CPUs" in line] == ["  look  jwb[0000-0063]  load: 9.0 on 4 CPUs"]


@pytest.mark.parametrize("count", [2, 3, 8, 127])
def test_nobody_meets_the_same_partner_twice(count: int):
    nodes = [str(number) for number in range(count)]
    dealt = pairings(nodes, rounds=3)
    met = [frozenset(pair) for pairs in dealt for pair in pairs]
    assert len(met) == len(set(met))
    assert all(len({node for pair in pairs for node in pair}) == count - count % 2 for pairs in dealt)
    assert len(dealt) == min(3, count + count % 2 - 1)


def test_a_report_survives_its_journey():
    sent = report(
        "a", clock=ClockReading(0.1, 0.2, None), seen={"b": True}, findings=(bad("x", "y"),), pairs={"b": None}
    )
    assert RankReport.from_json(sent.to_json()) == sent


def test_whoever_met_only_the_broken_node_is_not_blamed_for_it():
    """Three nodes in two rounds: one of them pauses in each."""
    pairs = {"a": {"c": None}, "b": {"c": None}, "c": {"a": None, "b": None}}
    assert judge([report(node, pairs=met) for node, met in pairs.items()]).exclude == ("c",)
