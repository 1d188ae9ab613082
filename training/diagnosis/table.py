"""Shows a diagnosis: one line for each node, what was found, and which nodes to leave out."""

from __future__ import annotations

from collections.abc import Sequence

from slurm.node_list import compress
from training.diagnosis.findings import Finding, Level, RankReport, Rate
from training.diagnosis.judge import PRESENCE, Diagnosis, NodeVerdict

_WORDS = {Level.OK: "ok", Level.UNKNOWN: "ok", Level.WARNING: "look", Level.BAD: "BAD"}
_SIGNS = {Level.OK: "ok", Level.UNKNOWN: "?", Level.WARNING: "look", Level.BAD: "BAD"}
_RATE_COLUMNS = {
    "compute": "compute TFLOP/s",
    "host to device": "h2d GB/s",
    "device to host": "d2h GB/s",
    "all-reduce in the node": "node GB/s",
}


def render(diagnosis: Diagnosis, reports: Sequence[RankReport]) -> str:
    """The whole text."""
    parts = [_table(diagnosis, reports), _findings(diagnosis)]
    among_all = [rate for report in reports for rate in report.rates if rate.check == "all-reduce among all"]
    if among_all:
        parts.append(f"All-reduce among all: {among_all[0].value:.3g} GB/s ({among_all[0].kind}).\n")
    if diagnosis.exclude:
        parts.append(
            f"Exclude {len(diagnosis.exclude)} of {len(diagnosis.nodes)}: --exclude={compress(diagnosis.exclude)}\n"
        )
    elif diagnosis.exit_code:
        parts.append("No node is to be excluded; what is bad must be mended first.\n")
    elif _some_are_missing(diagnosis):
        parts.append(
            "No node is to be excluded. Nobody is blamed for who is missing: training waits longer for them.\n"
        )
    else:
        parts.append(f"All {len(diagnosis.nodes)} node(s) can be trained on.\n")
    return "\n".join(part for part in parts if part)


def _some_are_missing(diagnosis: Diagnosis) -> bool:
    findings = [*diagnosis.job, *(finding for verdict in diagnosis.nodes for finding in verdict.findings)]
    return any(finding.check == PRESENCE for finding in findings)


def _table(diagnosis: Diagnosis, reports: Sequence[RankReport]) -> str:
    rows = [_row(verdict, [report for report in reports if report.node == verdict.node]) for verdict in diagnosis.nodes]
    used = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    widths = {name: max(len(name), *(len(row.get(name) or "-") for row in rows)) for name in used}
    lines = ["  ".join(name.ljust(widths[name]) for name in used).rstrip()]
    lines += ["  ".join((row.get(name) or "-").ljust(widths[name]) for name in used).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _row(verdict: NodeVerdict, reports: Sequence[RankReport]) -> dict[str, str]:
    leader = next((report for report in reports if report.leads), None)
    rates = [rate for report in reports for rate in report.rates]
    pairs = [rate for rate in (leader.pairs.values() if leader else ()) if rate is not None]
    row = {
        "node": verdict.node,
        "verdict": "EXCLUDE" if verdict.excluded else _WORDS[verdict.level],
        "ranks": str(len(reports)),
        "GPUs": leader.facts.get("visible GPUs", "") if leader else "",
    }
    row |= {title: _slowest(rates, check) for check, title in _RATE_COLUMNS.items()}
    row["pair GB/s"] = f"{max(pairs):.3g}" if pairs else ""
    row["run dir MB/s"] = _slowest(rates, "run directory")
    if leader is not None and leader.clock is not None:
        row["clock ms"] = f"{leader.clock.offset_s * 1e3:+.1f}"
    row["seconds"] = f"{leader.seconds:.0f}" if leader else ""
    return row


def _slowest(rates: Sequence[Rate], check: str) -> str:
    values = [rate.value for rate in rates if rate.check == check]
    return f"{min(values):.3g}" if values else ""


def _findings(diagnosis: Diagnosis) -> str:
    """The worst first. The same sentence stands once, with the nodes it is about."""
    job = [(finding, "all nodes") for finding in diagnosis.job]
    lines = [_line(finding, nodes) for finding, nodes in sorted(job, key=lambda entry: -entry[0].level)]
    nodes_of: dict[Finding, list[str]] = {}
    for verdict in diagnosis.nodes:
        for finding in dict.fromkeys(verdict.findings):
            nodes_of.setdefault(finding, []).append(verdict.node)
    for level in (Level.BAD, Level.WARNING, Level.UNKNOWN):
        lines += [_line(finding, compress(nodes)) for finding, nodes in nodes_of.items() if finding.level is level]
    well = [finding for finding in nodes_of if finding.level is Level.OK]
    for check in dict.fromkeys(finding.check for finding in well):
        alike = [finding for finding in well if finding.check == check]
        nodes = list(dict.fromkeys(node for finding in alike for node in nodes_of[finding]))
        # What is well differs between nodes in its numbers only: one example is enough.
        lines.append(_line(alike[0], compress(nodes)) + (" (e.g.)" if len(alike) > 1 else ""))
    return "\n".join(lines) + "\n"


def _line(finding: Finding, nodes: str) -> str:
    return f"  {_SIGNS[finding.level]:<4}  {nodes}  {finding.check}: {finding.text}"
