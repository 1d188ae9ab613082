"""Judges nodes: by what was found on each, and by how each differs from the others. Pure.

What is wrong on every node alike (the credentials, a file system that is not shared) is the job's trouble, and leaving
out nodes would not mend it; what is wrong on some is theirs.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from training.diagnosis.findings import ClockReading, Finding, Level, RankReport, Rate, bad, ok, warning
from training.diagnosis.run_directory import MEMORY_FILE_SYSTEMS
from training.resilience.exit_codes import BAD_USAGE, NODE_SUSPECTED

_RATE_LIMITS = {
    "compute": (0.92, 0.85),
    "host to device": (0.80, 0.50),
    "device to host": (0.80, 0.50),
    "all-reduce in the node": (0.80, 0.60),
}
"""(warning, bad) as a part of the others' median. GPUs of one kind differ by some percent; a PCIe link that lost half
of its lanes has half of its rate."""
_PAIR_LIMITS = (0.75, 0.50)
_FACT_LEVELS = {"kernel": Level.WARNING, "GPU driver": Level.WARNING, "cuDNN": Level.WARNING}
"""Facts in which nodes may differ and still train together; all others must agree."""
_CLOCK_LIMITS_S = (0.5, 5.0)
_FEW_NODES = 2
_FEW_ABSENT = 2
PRESENCE = "presence"
_PAIRS_CHECK = "all-reduce across nodes"
_UNJUDGED_KINDS = ("CPU", "gloo")
"""Shown and warned about: on a CPU every other process counts."""


class Absent(NamedTuple):
    """Ranks without a report."""

    node: str
    """Empty where nobody knows which."""
    ranks: tuple[int, ...]
    why: str


class NodeVerdict(NamedTuple):
    """All about a node."""

    node: str
    findings: tuple[Finding, ...]
    excluded: bool

    @property
    def level(self) -> Level:
        """The worst that was found."""
        return max((finding.level for finding in self.findings), default=Level.UNKNOWN)

    @property
    def reasons(self) -> str:
        """What is bad, in one line."""
        return "; ".join(f"{finding.check}: {finding.text}" for finding in self.findings if finding.level is Level.BAD)


@dataclass(frozen=True)
class Diagnosis:
    """What the examination of all nodes comes to."""

    nodes: tuple[NodeVerdict, ...]
    job: tuple[Finding, ...]
    """What no single node is to blame for."""

    @property
    def exclude(self) -> tuple[str, ...]:
        """The nodes to leave out."""
        return tuple(verdict.node for verdict in self.nodes if verdict.excluded)

    @property
    def exit_code(self) -> int:
        """2 where other nodes would not help, 95 where they would."""
        if any(finding.level is Level.BAD for finding in self.job):
            return BAD_USAGE
        return NODE_SUSPECTED if self.exclude else 0


def judge(reports: Sequence[RankReport], *, absent: Sequence[Absent] = ()) -> Diagnosis:
    """The verdict on every node, and on the job."""
    by_node: dict[str, list[Finding]] = {report.node: [] for report in reports}
    by_node |= {missing.node: [] for missing in absent if missing.node and missing.node not in by_node}
    for report in reports:
        by_node[report.node] += report.findings
    leaders = [report for report in reports if report.leads]
    job: list[Finding] = []
    for node, finding in (
        *_compare_rates(reports),
        *_compare_facts(leaders),
        *_compare_clocks(leaders),
        *_compare_sight(leaders),
        *_compare_pairs(reports),
        *_note_absent(absent, num_nodes=len(by_node)),
    ):
        if node is None:
            job.append(finding)
        else:
            by_node[node].append(finding)
    job += _move_shared(by_node)
    broken = [node for node, findings in by_node.items() if any(finding.level is Level.BAD for finding in findings)]
    judged = {report.node for report in reports} | set(broken)
    if len(judged) > _FEW_NODES and 2 * len(broken) > len(judged):
        what = f"{len(broken)} of {len(judged)} nodes are bad: look for what they share (driver, image, file system)"
        job.append(bad("nodes", f"{what}; none is excluded"))
        broken = []
    verdicts = (NodeVerdict(node, tuple(findings), node in broken) for node, findings in by_node.items())
    return Diagnosis(tuple(verdicts), tuple(job))


_Blamed = Iterator[tuple[str | None, Finding]]
"""(node, or None for the job; what is found)."""


def _compare_rates(reports: Sequence[RankReport]) -> _Blamed:
    groups: dict[tuple[str, str], list[tuple[str, Rate]]] = defaultdict(list)
    for report in reports:
        for rate in report.rates:
            groups[rate.check, rate.kind].append((report.node, rate))
    for (check, kind), rates in groups.items():
        if check not in _RATE_LIMITS or len(rates) == 1:
            continue
        values = [rate.value for _, rate in rates]
        for place, (node, rate) in enumerate(rates):
            others = _median_of_others(values, place)
            level = _level_of(rate.value / others, _RATE_LIMITS[check], judged=not kind.startswith(_UNJUDGED_KINDS))
            if level is not Level.OK:
                where = f"{rate.place}: " if rate.place else ""
                text = f"{where}{rate.value:.3g} {rate.unit}, the others {others:.3g} ({rate.value / others:.0%})"
                yield node, Finding(check, level, text)


def _compare_facts(leaders: Sequence[RankReport]) -> _Blamed:
    for name in dict.fromkeys(name for report in leaders for name in report.facts):
        nodes_with: dict[str, list[str]] = defaultdict(list)
        for report in leaders:
            if name in report.facts:
                nodes_with[report.facts[name]].append(report.node)
        if len(nodes_with) < 2:
            continue
        (usual, many), (_, fewer) = sorted(nodes_with.items(), key=lambda entry: -len(entry[1]))[:2]
        level = _FACT_LEVELS.get(name, Level.BAD)
        if len(many) == len(fewer):
            told = "; ".join(f"{value} on {', '.join(nodes[:3])}" for value, nodes in nodes_with.items())
            yield None, Finding(name, level, f"nodes differ, and which of them is right cannot be told: {told}")
            continue
        for value, nodes in nodes_with.items():
            for node in nodes if value != usual else ():
                yield node, Finding(name, level, f"{value}, but {usual} on {len(many)} other node(s)")


def _compare_clocks(leaders: Sequence[RankReport]) -> _Blamed:
    readings = {report.node: report.clock for report in leaders if report.clock is not None}
    if len(readings) < 2:
        return
    if len(readings) == _FEW_NODES:
        yield from _compare_two_clocks(readings)
        return
    middle = statistics.median(reading.offset_s for reading in readings.values())
    for node, reading in readings.items():
        late_s = reading.offset_s - middle
        level = _clock_level(abs(late_s) - reading.error_s)
        remedy = "" if level is Level.OK else ": restart its time service (chronyd)"
        yield node, Finding("clock", level, f"{late_s * 1e3:+.1f} ms from the middle of all{remedy}")


def _compare_two_clocks(readings: Mapping[str, ClockReading]) -> _Blamed:
    """Of two clocks that differ the wrong one is known only if the kernel of one admits that nobody keeps it."""
    (first, one), (second, other) = readings.items()
    apart_s = abs(one.offset_s - other.offset_s)
    level = _clock_level(apart_s - max(one.error_s, other.error_s))
    text = f"{apart_s * 1e3:.1f} ms apart from the other node's"
    unkept = [node for node, reading in readings.items() if reading.synchronised is False]
    for node in (first, second):
        if level is Level.OK:
            yield node, ok("clock", text)
        elif len(unkept) == 1 and node in unkept:
            yield node, Finding("clock", level, f"{text}, and no time service keeps it: start one (chronyd)")
        elif len(unkept) != 1:
            yield node, warning("clock", f"{text}: which of the two is wrong cannot be told")


def _compare_sight(leaders: Sequence[RankReport]) -> _Blamed:
    """Nodes that see each other's files have the same run directory; the largest such set is right."""
    looked = [report for report in leaders if report.seen]
    if not looked or all(all(report.seen.values()) for report in looked):
        return
    sets = _connected(looked)
    largest = max(map(len, sets))
    systems = {report.node: report.file_system for report in leaders}
    right = [nodes for nodes in sets if len(nodes) == largest]
    if len(right) > 1:
        # What lies in a node's memory is never shared.
        kept = [nodes for nodes in right if not any(systems.get(node) in MEMORY_FILE_SYSTEMS for node in nodes)]
        if len(kept) != 1:
            told = ", ".join(f"{node}: {systems.get(node) or 'unknown'}" for nodes in sets[:4] for node in nodes[:2])
            yield (
                None,
                bad(
                    "run directory",
                    f"the nodes do not see each other's files in it, so it lies on their own disks ({told}): pass "
                    "--logs with a directory that all nodes share",
                ),
            )
            return
        right = kept
    for nodes in sets:
        for node in nodes if nodes is not right[0] else ():
            where = f"it is on {systems[node]} there" if systems.get(node) else "it is another one there"
            yield node, bad("run directory", f"does not hold what the other nodes write into it ({where}): mount it")


def _connected(leaders: Sequence[RankReport]) -> list[list[str]]:
    """Sets of nodes that see each other, directly or through others."""
    group = {report.node: report.node for report in leaders}

    def find(node: str) -> str:
        while group[node] != node:
            node = group[node]
        return node

    for report in leaders:
        for other, is_there in report.seen.items():
            if is_there and other in group:
                group[find(other)] = find(report.node)
    sets: dict[str, list[str]] = defaultdict(list)
    for node in group:
        sets[find(node)].append(node)
    return list(sets.values())


def _compare_pairs(reports: Sequence[RankReport]) -> _Blamed:
    """A node is as fast as with its best partner: a good one has at least one good partner in several rounds."""
    paired = [report for report in reports if report.leads and report.pairs]
    best = [(report.node, max(rates)) for report in paired if (rates := _rates_of(report))]
    cut_off = {report.node for report in paired if len(report.pairs) > 1 and not _rates_of(report)}
    for report in paired:
        partners = ", ".join(report.pairs)
        if report.node in cut_off:
            yield report.node, bad(_PAIRS_CHECK, f"failed with each of {partners}: its network is broken")
        elif not _rates_of(report) and cut_off.isdisjoint(report.pairs):
            text = f"failed with {partners}, its only partner: the network of one of the two is broken"
            yield report.node, bad(_PAIRS_CHECK, text)
    if len(best) <= _FEW_NODES:
        return
    judged = not any(report.backend in _UNJUDGED_KINDS for report in paired)
    values = [rate for _, rate in best]
    for place, (node, rate) in enumerate(best):
        others = _median_of_others(values, place)
        level = _level_of(rate / others, _PAIR_LIMITS, judged=judged)
        if level is not Level.OK:
            text = f"{rate:.3g} GB/s with its best partner, the others {others:.3g} ({rate / others:.0%})"
            yield node, Finding(_PAIRS_CHECK, level, text)


def _rates_of(report: RankReport) -> list[float]:
    return [rate for rate in report.pairs.values() if rate is not None]


def _note_absent(absent: Sequence[Absent], *, num_nodes: int) -> _Blamed:
    """A node that is missing is to blame; many that are missing are slow to start, and training waits longer."""
    named = {missing.node for missing in absent if missing.node}
    many = len(named) > _FEW_ABSENT or (len(named) > 1 and 2 * len(named) >= num_nodes)
    for missing in absent:
        ranks = ", ".join(map(str, missing.ranks[:16])) + (", ..." if len(missing.ranks) > 16 else "")
        text = f"rank(s) {ranks} {missing.why}" if ranks else missing.why
        yield missing.node or None, Finding(PRESENCE, Level.BAD if missing.node and not many else Level.WARNING, text)


def _move_shared(by_node: dict[str, list[Finding]]) -> Iterator[Finding]:
    """Takes shared findings that are bad on all nodes from the nodes, and gives one of each kind to the job."""
    checks = Counter(
        check
        for findings in by_node.values()
        for check in {finding.check for finding in findings if finding.shared and finding.level is Level.BAD}
    )
    for check, count in checks.items():
        if count < len(by_node):
            continue
        texts = []
        for node, findings in by_node.items():
            moved = [finding for finding in findings if finding.shared and finding.check == check]
            texts += [finding.text for finding in moved if finding.level is Level.BAD]
            by_node[node] = [finding for finding in findings if finding not in moved]
        yield bad(check, texts[0] + (" (on all nodes)" if len(by_node) > 1 else ""))


def _level_of(ratio: float, limits: tuple[float, float], *, judged: bool) -> Level:
    if ratio >= limits[0]:
        return Level.OK
    return Level.BAD if judged and ratio < limits[1] else Level.WARNING


def _clock_level(apart_s: float) -> Level:
    if apart_s < _CLOCK_LIMITS_S[0]:
        return Level.OK
    return Level.BAD if apart_s > _CLOCK_LIMITS_S[1] else Level.WARNING


def _median_of_others(values: Sequence[float], place: int) -> float:
    return statistics.median([*values[:place], *values[place + 1 :]])
