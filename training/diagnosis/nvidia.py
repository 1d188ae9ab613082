"""Asks nvidia-smi about the health of a node's GPUs, and judges the answers."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from training.diagnosis.findings import Finding, bad, ok, unknown, warning

COMMAND = "nvidia-smi"
_TIME_LIMIT_S = 20.0
"""A driver that hangs is a broken node as well."""
_FIELDS = (
    *("index", "name", "pci.bus_id", "driver_version", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total"),
    *("ecc.errors.corrected.volatile.total", "retired_pages.pending", "clocks_throttle_reasons.active", "clocks.sm"),
    *("clocks.max.sm", "temperature.gpu", "power.draw", "pcie.link.width.current", "pcie.link.width.max"),
)
_REMAPPED_FIELDS = (
    *("gpu_bus_id", "remapped_rows.correctable", "remapped_rows.uncorrectable"),
    *("remapped_rows.pending", "remapped_rows.failure"),
)
_INVALID_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
_BAD_REASONS = {0x08: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
"""Of lower clocks. Source: the clocks event reasons of NVML. A power cap (0x4) is what a loaded GPU meets normally."""
_ODD_REASONS = {0x20: "software thermal slowdown", 0x02: "clocks were set by an administrator", 0x10: "sync boost"}
_MANY_CORRECTED = 1000

Row = Mapping[str, str]


class NvidiaSmiFailed(RuntimeError):
    """It is there, and gives no answer."""


def look_at_gpus() -> tuple[list[Finding], dict[str, str]]:
    """Findings, and the facts that all nodes should share. Takes a second or two; ask while the GPUs compute."""
    try:
        rows = ask("--query-gpu", _FIELDS)
    except FileNotFoundError:
        return [unknown("GPU health", f"{COMMAND} is not installed: no ECC, remapped rows, clocks")], {}
    except NvidiaSmiFailed as error:
        return [bad("GPU health", f"{error}: reboot the node")], {}
    try:
        remapped = ask("--query-remapped-rows", _REMAPPED_FIELDS)
    except NvidiaSmiFailed:
        remapped = []  # GPUs before Ampere have none
    return judge_gpus(rows, remapped)


def judge_gpus(rows: Sequence[Row], remapped: Sequence[Row]) -> tuple[list[Finding], dict[str, str]]:
    """Findings and shared facts from the answers. Pure."""
    if not rows:
        return [bad("GPU health", f"{COMMAND} lists no GPU: load the driver, or reboot the node")], {}
    findings = [finding for row in rows for finding in _judge_gpu(row)]
    findings += [finding for row in remapped for finding in _judge_rows(row)]
    names = sorted(row.get("name", "") for row in rows)
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    facts = {
        "GPUs": ", ".join(f"{count} x {name}" for name, count in counts.items()),
        "GPU driver": ", ".join(sorted({row.get("driver_version", "") for row in rows})),
    }
    if not findings:
        hottest = max((_number(row, "temperature.gpu") or 0 for row in rows), default=0)
        ecc = "ECC on" if all(row.get("ecc.mode.current") == "Enabled" for row in rows) else "ECC off or not there"
        findings = [ok("GPU health", f"{facts['GPUs']}; {ecc}, no errors, up to {hottest:.0f} degrees")]
    return findings, facts


def ask(option: str, fields: Sequence[str]) -> list[Row]:
    """One row per GPU; fields that this version of the tool does not know are left out.

    Raises:
        FileNotFoundError: there is no such tool. NvidiaSmiFailed: it does not answer, or with an error.
    """
    wanted = list(fields)
    while True:
        done = _run(f"{option}={','.join(wanted)}", "--format=csv,noheader,nounits")
        unknown_field = _INVALID_FIELD.search(done.stdout + done.stderr)
        if unknown_field is None or unknown_field[1] not in wanted:
            break
        wanted.remove(unknown_field[1])
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise NvidiaSmiFailed(f"{COMMAND} ended with {done.returncode}: {said[:200]}")
    lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(wanted, map(str.strip, line), strict=False)) for line in lines if line]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run((COMMAND, *arguments), capture_output=True, text=True, timeout=_TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NvidiaSmiFailed(f"{COMMAND} does not answer within {_TIME_LIMIT_S:g} s") from None


def _judge_gpu(row: Row) -> Iterator[Finding]:
    name = f"GPU {row.get('index', '?')} ({row.get('pci.bus_id', '?')})"
    if errors := _number(row, "ecc.errors.uncorrected.volatile.total"):
        yield bad(
            "GPU memory errors", f"{name}: {errors:.0f} uncorrected since the last reset: have it reset or replaced"
        )
    if (errors := _number(row, "ecc.errors.corrected.volatile.total") or 0) > _MANY_CORRECTED:
        yield warning("GPU memory errors", f"{name}: {errors:.0f} corrected since the last reset")
    if _is_yes(row.get("retired_pages.pending", "")):
        yield bad("GPU memory errors", f"{name}: pages wait to be retired: have it reset")
    reasons = _bits(row.get("clocks_throttle_reasons.active", ""))
    now, most, degrees = (row.get(field, "?") for field in ("clocks.sm", "clocks.max.sm", "temperature.gpu"))
    clocks = f"{now} of {most} MHz at {degrees} degrees"
    if slow := [text for bit, text in _BAD_REASONS.items() if reasons & bit]:
        yield bad("GPU clocks", f"{name}: {', '.join(slow)}, {clocks}: check its cooling and power supply")
    elif slow := [text for bit, text in _ODD_REASONS.items() if reasons & bit]:
        yield warning("GPU clocks", f"{name}: {', '.join(slow)}, {clocks}")
    lanes, width = _number(row, "pcie.link.width.current"), _number(row, "pcie.link.width.max")
    if lanes and width and lanes < width:
        yield warning("GPU link", f"{name}: {lanes:.0f} of {width:.0f} PCIe lanes")


def _judge_rows(row: Row) -> Iterator[Finding]:
    name = f"GPU {row.get('gpu_bus_id', '?')}"
    if _is_yes(row.get("remapped_rows.failure", "")):
        yield bad("GPU memory errors", f"{name}: a broken row could not be remapped: have it replaced")
    if _is_yes(row.get("remapped_rows.pending", "")):
        yield bad("GPU memory errors", f"{name}: rows wait to be remapped: have it reset")
    if count := _number(row, "remapped_rows.uncorrectable"):
        yield warning("GPU memory errors", f"{name}: {count:.0f} rows were remapped after uncorrectable errors")


def _number(row: Row, field: str) -> float | None:
    """None for ``[N/A]`` and the like."""
    try:
        return float(row[field])
    except (KeyError, ValueError):
        return None


def _bits(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0


def _is_yes(text: str) -> bool:
    return text.lower() in ("yes", "true") or (text.isdecimal() and int(text) > 0)
