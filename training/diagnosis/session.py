"""One examination from beginning to end: who is there, what each finds, the verdict of rank 0, and its files.

Only rank 0 ends with a code that says something, and after all others: under ``srun --kill-on-bad-exit`` the first
code above 0 would end it before it has spoken.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Timer
from typing import cast

import torch

from slurm.bad_nodes import BAD_NODES_FILE, record_suspects
from slurm.environment import Task, host_suffix, is_in_job, is_in_step, master_address, master_ports, read_task
from training.config import Config
from training.diagnosis.complaints import clear_complaints, complaining_after, read_complaints
from training.diagnosis.examine import QUICK, THOROUGH, Member, Subject, Team, choose_devices, examine
from training.diagnosis.findings import RankReport
from training.diagnosis.judge import Absent, Diagnosis, judge
from training.diagnosis.table import render
from training.distributed.roll_call import RollCall
from training.distributed.runtime import Place, read_place
from training.resilience.exit_codes import BAD_USAGE, NODE_SUSPECTED

logger = logging.getLogger(__name__)

_REPORT_LIMIT_S = 30.0
_EXAMINATION_LIMIT_S = 200.0
_LEAVING_LIMIT_S = 3.0
_NOT_EXAMINED = 1
"""The nodes did not meet here: no verdict, and no reason to refuse the job. Training meets in a way of its own."""


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    config: Config
    run: Path | None
    json_file: Path | None
    quick: bool
    arrival_limit_s: float
    """How long rank 0 waits for the others, and they for it."""


def hold_session(order: Order, environment: Mapping[str, str]) -> int:
    """Examines this node with all others of the job; the process's exit code.

    Raises:
        ValueError: what the launcher says about this process contradicts itself.
    """
    place = find_place(environment)
    node = node_name(environment)
    # Whoever waits for rank 0 first may then wait with it for others.
    waits = 1 if place.rank == 0 else 2
    with _ending_in_any_case(place, node, waits * order.arrival_limit_s + _EXAMINATION_LIMIT_S):
        return _hold(order, environment, place, node)


def _hold(order: Order, environment: Mapping[str, str], place: Place, node: str) -> int:
    if place.world_size == 1:
        member = Member(0, node, 0, "")
        report = _examine(order, environment, place, node, Team((member,)), secrets.token_hex(4), None)
        return _conclude(order, environment, [report], ())
    try:
        roll_call = _join(order, environment, place, node)
    except RuntimeError as error:
        logger.error("%s: %s", node, error)
        return _NOT_EXAMINED if place.rank == 0 else 0
    return _hold_together(order, environment, place, node, roll_call)


def _hold_together(order: Order, environment: Mapping[str, str], place: Place, node: str, roll_call: RollCall) -> int:
    roll_call.note(f"arrival/{place.rank}", json.dumps(_member(order, place, node)))
    if place.rank == 0:
        arrived = roll_call.collect("arrival", range(place.world_size), timeout_s=order.arrival_limit_s)
        members = tuple(Member(*json.loads(arrived[rank])) for rank in sorted(arrived))
        roll_call.note("team", json.dumps([secrets.token_hex(4), Team(members).to_json()]))
    told = roll_call.read("team", timeout_s=2 * order.arrival_limit_s)
    if told is None:
        logger.error("%s: rank 0 does not say who is there: giving up", node)
        return 0
    token, text = json.loads(told)
    team = Team.from_json(text)
    if place.rank not in {member.rank for member in team.members}:
        logger.error("%s: rank %d came too late: the others have begun", node, place.rank)
        return 0
    report = _examine(order, environment, place, node, team, token, roll_call)
    roll_call.note(f"report/{place.rank}", report.to_json())
    if place.rank != 0:
        roll_call.read("verdict", timeout_s=_EXAMINATION_LIMIT_S)
        roll_call.note(f"left/{place.rank}", "")
        return 0
    texts = roll_call.collect("report", [member.rank for member in team.members], timeout_s=_REPORT_LIMIT_S)
    reports = [RankReport.from_json(texts[rank]) for rank in sorted(texts)]
    absent = find_absent(
        place.world_size,
        team,
        set(texts),
        expected=_expected_ranks(environment),
        complaining=_hear_complaints(order, environment),
    )
    code = _conclude(order, environment, reports, absent)
    roll_call.note("verdict", str(code))
    roll_call.collect("left", [rank for rank in texts if rank != 0], timeout_s=_LEAVING_LIMIT_S)
    return code


def find_place(environment: Mapping[str, str]) -> Place:
    """As the trainer, but a shell within an allocation, where srun started nothing, is one process."""
    if is_in_job(environment) and not is_in_step(environment) and "RANK" not in environment:
        return Place(0, 0, 1)
    return read_place(environment)


def node_name(environment: Mapping[str, str]) -> str:
    """As SLURM calls it, so that it can be excluded by this name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def find_absent(
    world_size: int, team: Team, reported: set[int], *, expected: Mapping[str, int], complaining: Collection[str] = ()
) -> tuple[Absent, ...]:
    """Who did not come, and who came and fell silent. Pure.

    Args:
        expected: ranks on each node, by SLURM; empty where there is none.
        complaining: nodes that say themselves that they do not reach rank 0. One that is only late says nothing.
    """
    silent_nodes = [node for node in expected if not team.on(node)]
    unheard = [node for node in silent_nodes if node in complaining]
    if len(silent_nodes) > 1 and len(team.nodes) == 1 and 2 * len(unheard) > len(silent_nodes):
        why = f"{len(unheard)} of the other {len(silent_nodes)} nodes say that they do not reach it"
        return (Absent(team.nodes[0], (), f"{why}: its network is broken"),)
    absent = [Absent(node, (), "none of its ranks came in time") for node in silent_nodes]
    for node, count in expected.items():
        if 0 < len(team.on(node)) < count:
            absent.append(Absent(node, (), f"only {len(team.on(node))} of its {count} ranks came in time"))
    arrived = {member.rank for member in team.members}
    missing = tuple(rank for rank in range(world_size) if rank not in arrived)
    if missing and not absent:
        absent.append(Absent("", missing, "did not come in time; on which nodes they are is not known"))
    for node in team.nodes:
        silent = tuple(member.rank for member in team.on(node) if member.rank not in reported)
        if silent:
            absent.append(Absent(node, silent, "came, and gave no report in time"))
    return tuple(absent)


def _expected_ranks(environment: Mapping[str, str]) -> dict[str, int]:
    task = read_task(environment)
    return {} if task is None else dict(zip(task.nodes, task.tasks_per_node, strict=True))


def _hear_complaints(order: Order, environment: Mapping[str, str]) -> set[str]:
    task = read_task(environment)
    if task is None or order.run is None:
        return set()
    found = read_complaints(order.run, task.identity)
    clear_complaints(order.run)
    return found


def _join(order: Order, environment: Mapping[str, str], place: Place, node: str) -> RollCall:
    task = read_task(environment)
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if task is None and not (host and port):
        raise ValueError(
            f"{place.world_size} processes, but MASTER_ADDR and MASTER_PORT are not set, so they cannot find each "
            "other: start with srun or torchrun"
        )
    if not host:
        assert task is not None
        host = master_address(task, suffix=host_suffix(order.config.engine.slurm_host_suffix, environment))
    if port and not port.isdecimal():
        raise ValueError(f"MASTER_PORT={port!r} is not a number: unset it, or correct it")
    ports = (int(port),) if port else master_ports(cast(Task, task))
    join = partial(
        RollCall,
        host,
        ports,
        identity=environment.get("TORCHELASTIC_RUN_ID", "") if task is None else task.identity,
        rank=place.rank,
        world_size=place.world_size,
        timeout_s=order.arrival_limit_s,
    )
    if place.rank == 0 or task is None or order.run is None:
        return join()
    # Early enough for a rank 0 that came first to read it.
    with complaining_after(order.arrival_limit_s / 2, order.run, node=node, identity=task.identity):
        return join()


def _member(order: Order, place: Place, node: str) -> Member:
    on_gpu = order.config.engine.device.startswith("cuda") and torch.cuda.is_available()
    return Member(place.rank, node, place.local_rank, "cuda" if on_gpu else "cpu")


def _examine(
    order: Order,
    environment: Mapping[str, str],
    place: Place,
    node: str,
    team: Team,
    token: str,
    roll_call: RollCall | None,
) -> RankReport:
    devices, findings = choose_devices(
        order.config,
        local_rank=place.local_rank,
        tasks_on_node=len(team.on(node)),
        given_gpus=_number(environment.get("SLURM_GPUS_ON_NODE", "")),
    )
    depth = QUICK if order.quick else THOROUGH
    report = examine(Subject(order.config, order.run, depth, place.rank, node, token), team, devices, roll_call)
    return replace(report, findings=(*findings, *report.findings))


def _conclude(
    order: Order, environment: Mapping[str, str], reports: Sequence[RankReport], absent: Sequence[Absent]
) -> int:
    """Rank 0 judges, prints and writes."""
    diagnosis = judge(reports, absent=absent)
    sys.stdout.write(render(diagnosis, reports))
    sys.stdout.flush()
    try:
        if order.run is not None:
            record_bad_nodes(order.run / BAD_NODES_FILE, diagnosis)
        if order.json_file is not None:
            order.json_file.write_text(json.dumps(_as_json(diagnosis, reports), indent=1) + "\n")
    except OSError as error:
        logger.error("The verdict cannot be written: %s", error)
        return diagnosis.exit_code or BAD_USAGE
    return diagnosis.exit_code


def record_bad_nodes(path: Path, diagnosis: Diagnosis) -> None:
    """Adds a line for each node to leave out; the batch script reads them."""
    record_suspects(
        path, [(verdict.node, f"doctor: {verdict.reasons}"[:500]) for verdict in diagnosis.nodes if verdict.excluded]
    )


def _as_json(diagnosis: Diagnosis, reports: Sequence[RankReport]) -> dict[str, object]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit_code": diagnosis.exit_code,
        "exclude": list(diagnosis.exclude),
        "job": [asdict(finding) for finding in diagnosis.job],
        "nodes": [
            {"node": verdict.node, "excluded": verdict.excluded, "findings": [asdict(f) for f in verdict.findings]}
            for verdict in diagnosis.nodes
        ],
        "reports": [asdict(report) for report in reports],
    }


@contextmanager
def _ending_in_any_case(place: Place, node: str, limit_s: float) -> Iterator[None]:
    """A native call that never returns must not keep an allocation."""

    def end() -> None:
        sys.stderr.write(f"{node}: rank {place.rank} did not come to an end within {limit_s:g} s\n")
        sys.stderr.flush()
        os._exit(NODE_SUSPECTED if place.rank == 0 else 0)

    timer = Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
