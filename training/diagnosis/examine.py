"""Examines a node from one of its processes, in step with the processes of the other nodes where there are any.

    arrive -> own device | node: tools, disks, data, run directory -> what others wrote, clocks -> all-reduces -> report

No step waits for a rank longer than its time limit, and no check can hang another: each runs in a thread of its own.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import NamedTuple, TypeVar

import torch

from training.config import Config
from training.diagnosis.clocks import ClockServer, ask_offset
from training.diagnosis.data_access import has_data, read_shards
from training.diagnosis.device_speed import Measured, measure_device
from training.diagnosis.findings import ClockReading, Finding, RankReport, Rate, bad, ok, unknown, warning
from training.diagnosis.machine import PORTS, clock_is_synchronised, look_at_cores, look_at_machine
from training.diagnosis.nvidia import look_at_gpus
from training.diagnosis.pairing import pairings
from training.diagnosis.run_directory import RunDirectory, file_system_of, neighbours
from training.diagnosis.software import look_for_modules, needed_modules, read_versions
from training.distributed.link_rates import LinkFailed, LinkRates
from training.distributed.roll_call import RollCall
from training.distributed.store_calls import StoreSilent, answer_within

logger = logging.getLogger(__name__)

T = TypeVar("T")
IN_NODE, ACROSS, AMONG_ALL = "all-reduce in the node", "all-reduce across nodes", "all-reduce among all"
_CHECK_LIMIT_S = 20.0
_MEETING_LIMIT_S = 30.0
_LINK_LIMIT_S = 15.0
_ALL_LINKS_LIMIT_S = 30.0


class Depth(NamedTuple):
    """How much is measured."""

    seconds: float
    """Of matrix products, checked and timed each."""
    pairs_per_node: int
    nccl_bytes: int
    gloo_bytes: int
    thorough: bool
    """Also loads modules, and measures an all-reduce of all ranks."""


THOROUGH = Depth(1.0, pairs_per_node=3, nccl_bytes=256 << 20, gloo_bytes=16 << 20, thorough=True)
QUICK = Depth(0.25, pairs_per_node=2, nccl_bytes=64 << 20, gloo_bytes=4 << 20, thorough=False)


@dataclass(frozen=True)
class Subject:
    """What is examined, as seen from one process."""

    config: Config
    run: Path | None
    """The run directory."""
    depth: Depth
    rank: int
    node: str
    token: str
    """The same on all ranks, and new each time."""


class Member(NamedTuple):
    """A rank that has arrived."""

    rank: int
    node: str
    local_rank: int
    device: str


@dataclass(frozen=True)
class Team:
    """The ranks that have arrived; those that come later are left out."""

    members: tuple[Member, ...]

    @property
    def nodes(self) -> list[str]:
        """In the order of their first ranks."""
        return list(dict.fromkeys(member.node for member in self.members))

    def on(self, *nodes: str) -> list[Member]:
        """The ranks of some nodes, in order."""
        return [member for member in self.members if member.node in nodes]

    def leads(self, rank: int) -> bool:
        """Whether a rank is the first of its node."""
        return any(rank == self.on(node)[0].rank for node in self.nodes)

    def measured_ranks(self, *nodes: str) -> list[int]:
        """Of those whose device is the usual one: a rank that lost its GPU cannot take part in what GPUs do."""
        usual = Counter(member.device for member in self.members).most_common(1)[0][0]
        return [member.rank for member in (self.on(*nodes) if nodes else self.members) if member.device == usual]

    def to_json(self) -> str:
        """For the other ranks."""
        return json.dumps(self.members)

    @classmethod
    def from_json(cls, text: str) -> Team:
        """What ``to_json`` wrote."""
        return cls(tuple(Member(*values) for values in json.loads(text)))


@dataclass
class _Notes:
    """What is gathered on the way to a report."""

    findings: list[Finding] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def add(self, measured: tuple[list[Finding], list[Rate]]) -> None:
        self.findings += measured[0]
        self.rates += measured[1]


def choose_devices(
    config: Config, *, local_rank: int, tasks_on_node: int, given_gpus: int
) -> tuple[list[torch.device], list[Finding]]:
    """The devices that this process looks at: its own, or all of the node where it is the only process there.

    Args:
        given_gpus: by the scheduler to this node; 0 where it says nothing.
    """
    cpu = [torch.device("cpu")]
    if not config.engine.device.startswith("cuda"):
        return cpu, [unknown("GPUs", f"not looked at, as --device {config.engine.device} says")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if given_gpus:
            remedy = "load the driver, or reboot the node"
            return cpu, [bad("GPUs", f"SLURM gives {given_gpus}, torch finds no CUDA device: {remedy}")]
        return cpu, [unknown("GPUs", "torch finds no CUDA device: the CPU is measured instead")]
    if tasks_on_node == 1:
        devices = [torch.device("cuda", index) for index in range(count)]
        if count < given_gpus:
            return devices, [bad("GPUs", f"SLURM gives {given_gpus}, torch finds {count}: reboot the node")]
        return devices, [ok("GPUs", f"{count} visible")]
    if count == 1:  # srun --gpus-per-task=1: each process sees its own
        return [torch.device("cuda", 0)], [ok("GPUs", "one visible to each process")]
    if local_rank >= count:
        text = f"{count} visible to {tasks_on_node} processes: start as many as there are GPUs (--ntasks-per-node)"
        return cpu, [bad("GPUs", text, shared=True)]
    return [torch.device("cuda", local_rank)], [ok("GPUs", f"{count} visible")]


def examine(subject: Subject, team: Team, devices: Sequence[torch.device], roll_call: RollCall | None) -> RankReport:
    """Everything this process can find out. All ranks of the team call it."""
    start = time.monotonic()
    notes = _Notes()
    # Each rank for itself: they may be bound to different cores.
    notes.findings.append(look_at_cores(len(os.sched_getaffinity(0)), workers=subject.config.data.workers))
    leads = team.leads(subject.rank)
    node_checks = Thread(target=_look_at_tools, args=(subject, team, notes), daemon=True) if leads else None
    if node_checks is not None:
        node_checks.start()  # while the devices compute: clocks and temperatures of idle ones tell nothing
    for device in devices:
        notes.add(_measure(subject, device))
    if node_checks is not None:
        node_checks.join(2 * _CHECK_LIMIT_S)
    report = RankReport(subject.rank, subject.node, leads)
    directory = RunDirectory(subject.run, token=subject.token, node=subject.node) if subject.run else None
    if leads:
        _look_at_storage(subject, directory, notes)
    if roll_call is not None:
        report = _compare_with_others(subject, team, roll_call, devices[0], directory, notes, report)
    if leads and directory is not None:
        _within(_CHECK_LIMIT_S, "run directory", directory.clean_up, notes)
    return replace(
        report,
        findings=tuple(notes.findings),
        rates=tuple(notes.rates),
        facts=notes.facts,
        file_system=file_system_of(subject.run) if subject.run else "",
        seconds=time.monotonic() - start,
    )


def _measure(subject: Subject, device: torch.device) -> Measured:
    notes = _Notes()
    limit_s = _CHECK_LIMIT_S + 4 * subject.depth.seconds
    measured = _within(limit_s, "matrix product", lambda: measure_device(device, seconds=subject.depth.seconds), notes)
    return measured if measured is not None else Measured(notes.findings, [])


def _look_at_tools(subject: Subject, team: Team, notes: _Notes) -> None:
    """What needs neither the device nor the storage."""
    data = subject.config.data
    ranks = len(team.on(subject.node))
    for found in (
        _within(2 * _CHECK_LIMIT_S, "GPU health", look_at_gpus, notes),
        _within(_CHECK_LIMIT_S, "versions", lambda: ([], read_versions()), notes),
    ):
        if found is not None:
            notes.findings += found[0]
            notes.facts |= found[1]
    if subject.config.engine.device.startswith("cuda"):
        notes.facts["visible GPUs"] = str(torch.cuda.device_count())
    machine = _within(
        _CHECK_LIMIT_S,
        "machine",
        lambda: look_at_machine(ranks=ranks, cache_directory=data.cache_shards, cache_gib=data.cache_gib),
        notes,
    )
    notes.findings += machine or []
    notes.facts |= {finding.check: finding.text for finding in machine or () if finding.check == PORTS}


def _look_at_storage(subject: Subject, directory: RunDirectory | None, notes: _Notes) -> None:
    config = subject.config
    if directory is not None:
        written = _within(_CHECK_LIMIT_S, "run directory", directory.write_and_read, notes, shared=True)
        notes.add(written or ([], []))
    else:
        notes.findings.append(unknown("run directory", "none was named: pass --run, or --logs and --name"))
    if has_data(config.data):
        read = _within(_CHECK_LIMIT_S, "shards", lambda: read_shards(config.data), notes, shared=True)
        notes.findings += read or []
    else:
        notes.findings.append(unknown("shards", "no data was named: pass --config or --train-data"))
    needed = needed_modules(config)
    found = _within(2 * _CHECK_LIMIT_S, "modules", lambda: look_for_modules(needed, load=subject.depth.thorough), notes)
    if found is not None:
        notes.findings.append(found)


def _compare_with_others(
    subject: Subject,
    team: Team,
    roll_call: RollCall,
    device: torch.device,
    directory: RunDirectory | None,
    notes: _Notes,
    report: RankReport,
) -> RankReport:
    size = len(team.members)
    server = ClockServer() if subject.rank == team.members[0].rank else None
    if server is not None:
        roll_call.note("clock", str(server.port))
    roll_call.meet("written", size=size, timeout_s=_MEETING_LIMIT_S + 3 * _CHECK_LIMIT_S)
    seen: dict[str, bool] = {}
    clock = None
    if report.leads:
        if directory is not None:
            others = neighbours(subject.node, team.nodes)
            seen = _within(_CHECK_LIMIT_S, "run directory", lambda: directory.look_for(others), notes) or {}
        clock = _read_clock(roll_call, notes)
    roll_call.meet("looked", size=size, timeout_s=_MEETING_LIMIT_S)
    if server is not None:
        server.close()
    backend, pairs = "", {}
    if subject.rank in team.measured_ranks():
        backend = "nccl" if device.type == "cuda" else "gloo"
        pairs = _measure_links(subject, team, roll_call, device, backend, notes)
    return replace(report, seen=seen, clock=clock, backend=backend, pairs=pairs)


def _read_clock(roll_call: RollCall, notes: _Notes) -> ClockReading | None:
    port = roll_call.read("clock", timeout_s=_MEETING_LIMIT_S)
    if port is None:
        return None
    try:
        offset = ask_offset(roll_call.host, int(port))
    except OSError as error:
        notes.findings.append(warning("clock", f"{roll_call.host}:{port} does not tell its time ({error})"))
        return None
    return ClockReading(offset.offset_s, offset.error_s, clock_is_synchronised())


def _measure_links(
    subject: Subject, team: Team, roll_call: RollCall, device: torch.device, backend: str, notes: _Notes
) -> dict[str, float | None]:
    """All-reduces within the node, between two nodes, among all. Partner -> GB/s, None if it failed."""
    depth = subject.depth
    num_bytes = depth.nccl_bytes if backend == "nccl" else depth.gloo_bytes
    links = LinkRates(roll_call.part("links"), rank=subject.rank, device=device, backend=backend, num_bytes=num_bytes)
    kind = f"{backend}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}"

    def reduce(name: str, check: str, ranks: list[int], limit_s: float = _LINK_LIMIT_S) -> float | None:
        try:
            rate = links.measure(name, ranks, timeout_s=limit_s)
        except LinkFailed as error:
            logger.warning("%s: %s with ranks %s: %s", subject.node, check, ranks, error)
            if check != ACROSS:  # who of a pair is to blame, its other pairs tell
                notes.findings.append(bad(check, f"{len(ranks)} ranks: {error}"))
            return None
        if check != ACROSS and subject.rank == ranks[0]:
            notes.rates.append(Rate(check, rate, "GB/s", f"{kind}, {len(ranks)} ranks"))
        return rate

    own = team.measured_ranks(subject.node)
    if len(own) > 1:
        reduce(f"node {subject.node}", IN_NODE, own)
    pairs: dict[str, float | None] = {}
    rounds = depth.pairs_per_node + len(team.nodes) % 2  # of an odd number, each round leaves one node out
    for number, dealt in enumerate(pairings(team.nodes, rounds=rounds)):
        roll_call.meet(f"round {number}", size=len(team.measured_ranks()), timeout_s=_MEETING_LIMIT_S)
        for pair in (pair for pair in dealt if subject.node in pair):
            (partner,) = (node for node in pair if node != subject.node)
            pairs[partner] = reduce(f"round {number} {pair}", ACROSS, team.measured_ranks(*pair))
    if len(team.nodes) > 1 and depth.thorough:
        roll_call.meet("all", size=len(team.measured_ranks()), timeout_s=_MEETING_LIMIT_S)
        reduce("all", AMONG_ALL, team.measured_ranks(), _ALL_LINKS_LIMIT_S)
    return pairs


def _within(limit_s: float, check: str, work: Callable[[], T], notes: _Notes, *, shared: bool = False) -> T | None:
    """The work's result; what takes too long, or breaks off, becomes a finding."""
    try:
        return answer_within(limit_s, lambda: _guarded(work))
    except StoreSilent:
        text = f"no answer within {limit_s:g} s: what it asks hangs on this node"
        notes.findings.append(bad(check, text, shared=shared))
    except _Broken as broken:
        # Our own mistake, or something nobody thought of: said, but no reason to exclude a node.
        notes.findings.append(unknown(check, f"could not be looked at ({broken})"))
    return None


class _Broken(RuntimeError):
    """A check that ended in an error of its own."""


def _guarded(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        logger.debug("A check failed", exc_info=True)
        raise _Broken(f"{type(error).__name__}: {error}") from error
