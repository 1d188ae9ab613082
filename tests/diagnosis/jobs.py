"""Starts the doctor on several real processes that believe to be on several nodes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.launch import start_ranks
from training.commands.doctor import main
from training.diagnosis import examine, session
from training.distributed.link_rates import LinkFailed, LinkRates


class Examined(NamedTuple):
    """What an examination came to."""

    codes: list[int | None]
    """Exit codes in rank order."""
    text: str
    """What rank 0 printed."""
    errors: str
    verdict: dict[str, Any]


def examine_nodes(
    nodes: list[str], directory: Path, *flags: str, trouble: Callable[[str], None] | None = None
) -> Examined:
    """``clipyard doctor --quick FLAGS`` with a rank on each of ``nodes``.

    Args:
        trouble: what happens first on every rank, by its node's name.
    """
    verdict = directory / "verdict.json"
    line = ["--quick", "--device=cpu", f"--run={directory / 'run'}", f"--json={verdict}", *flags]
    errors = [directory / f"errors-{rank}" for rank in range(len(nodes))]
    processes = start_ranks(len(nodes), _examine_one, line, directory, trouble, own=nodes, stderr=errors)
    for process in processes:
        process.join(timeout=60 if process is processes[0] else 10)
        process.kill()
        process.join()
    return Examined(
        [process.exitcode for process in processes],
        (directory / f"out-{nodes[0]}").read_text(),
        "".join(path.read_text() for path in errors),
        json.loads(verdict.read_text()) if verdict.exists() else {},
    )


def _examine_one(line: list[str], directory: Path, trouble: Callable[[str], None] | None, node: str) -> None:
    os.environ["SLURMD_NODENAME"] = node
    session.QUICK = session.QUICK._replace(seconds=0.05, gloo_bytes=1 << 20)
    if trouble is not None:
        trouble(node)
    lines = [part.replace("NODE", node) for part in line]
    with (directory / f"out-{node}").open("a") as out, contextlib.redirect_stdout(out):
        code = main(lines)
    os._exit(code)


def as_slurm_step(node: str) -> None:
    """As srun would start these ranks, one on each of a, b and c."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a,b,c", "SLURM_STEP_NUM_TASKS": "3"}
    place = {"SLURM_PROCID": os.environ["RANK"], "SLURM_LOCALID": "0", "SLURM_NODEID": str("abc".index(node))}
    os.environ.update(step | place | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]


def never_arrives(node: str) -> None:
    """Node c is busy with something else."""
    if node == "c":
        time.sleep(60)


def has_broken_links(node: str) -> None:
    """Node c answers everything and takes part in no all-reduce."""
    examine._LINK_LIMIT_S = 2.0

    def fail(*_: object) -> float:
        raise LinkFailed("the cable is out")

    if node == "c":
        LinkRates._measure = fail  # type: ignore[method-assign]


def corrupts_sums(node: str) -> None:
    """Node c sends something else than it should."""
    reduce = LinkRates._reduce

    def wrongly(links: LinkRates, group: Any, numbers: Any, place: int, size: int) -> float:
        return reduce(links, group, numbers, place + 7, size)

    examine._LINK_LIMIT_S = 4.0
    if node == "c":
        LinkRates._reduce = wrongly  # type: ignore[method-assign]


def hangs_in_a_check(node: str) -> None:
    """What reads the shards on node c waits for a server that is gone."""
    examine._CHECK_LIMIT_S = 2.0
    if node == "c":
        examine.look_at_machine = lambda **_: time.sleep(60)  # type: ignore[assignment]
