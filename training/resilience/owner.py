"""Says which process started a run, and whether that process is gone for certain.

Three witnesses, none of them a clock: the process table, for a process of this very node or container; the boot
number, for a node that was started again; the scheduler, for everything else.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

_ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}
"""Of a job of SLURM none of whose processes runs (any more, or yet again). COMPLETING is none: they may linger."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Owner:
    """A process, and where to ask about it; an empty text is unknown."""

    host: str
    machine: str
    """The same for every boot of a machine."""
    boot: str
    namespace: str
    """The same for processes that see each other's numbers, within one boot."""
    pid: int
    started: str
    """Tells the process from a later one with the same number."""
    cluster: str = ""
    job: str = ""
    step: str = ""
    restart: int = 0

    def describe(self) -> str:
        """For an error message."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """Raises KeyError, TypeError or ValueError where a record is not one."""
        values = {field.name: record[field.name] for field in fields(cls)}
        texts = [value for name, value in values.items() if name not in ("pid", "restart")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("not the record of a process")
        return cls(**values | {"pid": int(values["pid"]), "restart": int(values["restart"])})


def this_process(environment: Mapping[str, str] = os.environ) -> Owner:
    """The process that asks."""
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return Owner(
        host=socket.gethostname(),
        machine=_read("/etc/machine-id"),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
        # Jobs have the variable, login nodes have not: both must name the same cluster.
        cluster=environment.get("SLURM_CLUSTER_NAME") or _cluster_name(),
        job=environment.get("SLURM_JOB_ID", ""),
        step=environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "")),
        restart=int(restart) if restart.isdecimal() else 0,
    )


def why_ended(owner: Owner, *, me: Owner) -> str | None:
    """How it is known that the owner runs no more; None if it runs, or if nobody here can tell."""
    here = (owner.boot, owner.namespace) == (me.boot, me.namespace)
    if here and (owner.boot or owner.host == me.host):
        return _why_ended_here(owner, me=me)
    if owner.job and owner.job == me.job and owner.cluster == me.cluster and owner.restart < me.restart:
        return f"the scheduler has started job {me.job} again since"
    if owner.job and owner.cluster == me.cluster:
        return _why_ended_by_scheduler(owner)
    same_machine = owner.machine and (owner.host, owner.machine) == (me.host, me.machine)
    if same_machine and owner.boot and me.boot and owner.boot != me.boot:
        return f"{me.host} was booted again since"
    return None


def _why_ended_here(owner: Owner, *, me: Owner) -> str | None:
    if (owner.pid, owner.started) == (me.pid, me.started):
        return "it is this process, which has begun anew"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return f"there is no process {owner.pid} on {me.host} any more"
    except PermissionError:
        pass  # somebody else's; its start time says whether it is the one
    if _state(owner.pid) in ("Z", "X"):
        return f"process {owner.pid} on {me.host} has ended"
    started = _start_time(owner.pid)
    if owner.started and started and started != owner.started:
        return f"process {owner.pid} on {me.host} is another one by now"
    return None


def _why_ended_by_scheduler(owner: Owner) -> str | None:
    """What squeue says; it forgets a job some minutes after its end."""
    states = _squeue("--states=all", "--format=%T", job=owner.job)
    if states is None:
        return None
    if not states or set(states) <= _ENDED_STATES:
        return f"job {owner.job} is {states[0] if states else 'not known to the scheduler any more'}"
    if owner.step:
        steps = _squeue("--steps", "--format=%i", job=owner.job)
        # The steps of a job array go by another number than the job's own.
        known = steps is not None and all(step.startswith(f"{owner.job}.") for step in steps)
        if known and f"{owner.job}.{owner.step}" not in (steps or ()):
            return f"step {owner.job}.{owner.step} has ended"
    return None


def _squeue(*arguments: str, job: str) -> list[str] | None:
    """The words it prints about a job; empty if it knows no such job, None if it cannot be asked."""
    done = _ask("squeue", "--noheader", f"--jobs={job}", *arguments)
    if done is None:
        return None
    if done.returncode != 0:
        return [] if "Invalid job id" in done.stderr else None
    return done.stdout.split()


@functools.cache
def _cluster_name() -> str:
    """The cluster whose SLURM answers here; empty if none does."""
    done = _ask("scontrol", "show", "config")
    if done is None or done.returncode != 0:
        return ""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", done.stdout, re.MULTILINE)
    return found[1] if found is not None else ""


def _ask(name: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """A program of SLURM's; None where it is not installed or does not answer."""
    program = shutil.which(name)
    if program is None:
        return None
    command = [program, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _start_time(pid: int) -> str:
    """In clock ticks since the boot; empty if nobody knows."""
    fields_ = _stat(pid)
    return fields_[19] if len(fields_) > 19 else ""


def _state(pid: int) -> str:
    """A letter; empty if nobody knows."""
    return next(iter(_stat(pid)), "")


def _stat(pid: int) -> list[str]:
    """pid (name) state parent ...: from the state on, as the name may contain anything. Field 22 is the start time."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
