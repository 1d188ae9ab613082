"""What SLURM tells a process about itself, and where the processes of its step meet. Pure, without torch.

Variables of a step are srun's own (SLURM_STEP_*): inside of an allocation several steps may run, on parts of it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from slurm.node_list import expand

_FIRST_PORT, _NUM_PORTS = 20_000, 40_000
_PORTS_TRIED = 4
"""Ports of one start: where another program has one of them, the processes meet at the next."""
_SYSTEMS_WITH_SUFFIX = ("juwelsbooster", "juwels", "jurecadc", "jusuf")
"""At JSC a host has a second name for its InfiniBand address: jwb0001i. Their newer systems do not."""


@dataclass(frozen=True)
class Task:
    """A process that srun has started."""

    rank: int
    local_rank: int
    world_size: int
    node_index: int
    nodes: tuple[str, ...]
    """Of the step, in SLURM's order."""
    tasks_per_node: tuple[int, ...]
    identity: str
    """Of the step, and of this start of it: cluster, job, step, restart."""

    @property
    def node(self) -> str:
        """SLURM's name of the node that the process runs on."""
        return self.nodes[self.node_index]

    @property
    def tasks_on_node(self) -> int:
        """Processes of the step on this node."""
        return self.tasks_per_node[self.node_index]


def is_in_job(environment: Mapping[str, str]) -> bool:
    """Whether this process belongs to a job, be it the batch script's or a step's."""
    return bool(environment.get("SLURM_JOB_ID"))


def is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or one above it. A batch script has a SLURM_PROCID as well, always 0."""
    return "SLURM_PROCID" in environment and bool(_step(environment))


def read_task(environment: Mapping[str, str]) -> Task | None:
    """This process among those of its step; None if srun has not started it.

    Raises:
        ValueError: variables that SLURM has not set like this.
    """
    if not is_in_step(environment):
        return None
    nodes = tuple(expand(_read(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")))
    tasks_per_node = expand_counts(_read(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    task = Task(
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        node_index=_number(environment, "SLURM_NODEID"),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        identity=identity(environment),
    )
    if not len(nodes) == len(tasks_per_node) > task.node_index:
        raise ValueError(
            f"SLURM_NODEID={task.node_index}, {len(nodes)} node(s) in the step's list and {len(tasks_per_node)} in "
            "SLURM_STEP_TASKS_PER_NODE: variables of another step are exported; start with srun from a clean shell"
        )
    return task


def identity(environment: Mapping[str, str]) -> str:
    """Of a step and its restart: no two on a cluster share it."""
    restart = environment.get("SLURM_RESTART_COUNT") or "0"
    parts = (
        environment.get("SLURM_CLUSTER_NAME", ""),
        environment.get("SLURM_JOB_ID", ""),
        _step(environment),
        restart,
    )
    return "{}/job {} step {} restart {}".format(*parts).removeprefix("/")


def expand_counts(text: str) -> tuple[int, ...]:
    """``4(x3),2`` is 4, 4, 4, 2.

    Raises:
        ValueError: not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"tasks per node {text!r}: {part!r} is neither a number nor of the form 4(x3)")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def host_suffix(setting: str, environment: Mapping[str, str]) -> str:
    """What ``--slurm-host-suffix`` means here: ``auto`` is ``i`` on JSC's systems that need it."""
    if setting != "auto":
        return setting
    return "i" if environment.get("SYSTEMNAME") in _SYSTEMS_WITH_SUFFIX else ""


def master_address(task: Task, *, suffix: str) -> str:
    """The step's first node, which runs rank 0."""
    host, dot, domain = task.nodes[0].partition(".")
    return f"{host}{suffix}{dot}{domain}"


def master_ports(task: Task) -> tuple[int, ...]:
    """Where rank 0 of this start may listen, in the order to try; another job or restart has others, most likely."""
    seeds = (f"{task.identity} {attempt}" for attempt in range(_PORTS_TRIED))
    return tuple(_FIRST_PORT + zlib.crc32(seed.encode()) % _NUM_PORTS for seed in seeds)


def _step(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID") or ""


def _read(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise ValueError(
        f"srun has started this process (SLURM_STEP_ID={_step(environment)}), but {' and '.join(names)} is not set: "
        "something between srun and Python removes SLURM's variables (env -i, a container's settings); let them through"
    )


def _number(environment: Mapping[str, str], *names: str) -> int:
    text = _read(environment, *names)
    if not text.strip().isdecimal():
        name = next(name for name in names if environment.get(name))
        raise ValueError(f"{name}={text!r} is not a whole number: SLURM's variables were changed; leave them alone")
    return int(text)
