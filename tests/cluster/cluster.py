"""Submits scripts to a real SLURM and waits for what becomes of them.

job = cluster.submit(script, "--nodes=2")    sbatch
job.wait_for("COMPLETED")                    polls; fails with the job's log if it ends otherwise
job.log, job.facts()["ExitCode"]             what is left
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SANDBOX = REPOSITORY / "tests/cluster/slurm-sandbox.sh"
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
_POLL_S = 0.2


class Job:
    """A job, or one task of an array, by its number."""

    def __init__(self, number: str, *, log: Path) -> None:
        self.number = number
        self.log_path = log
        """Where the batch script writes, unless the script says otherwise."""

    @property
    def log(self) -> str:
        """What the batch script has written."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def facts(self) -> dict[str, str]:
        """What SLURM knows: JobState, ExitCode, Restarts, BatchHost, NodeList, Reason, ..."""
        line = command("scontrol", "show", "job", "--oneliner", self.number).strip().splitlines()[0]
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", line))

    def state(self) -> str:
        """PENDING, RUNNING, COMPLETING or one of ENDED."""
        return self.facts()["JobState"]

    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.facts()["Restarts"])

    def exit_code(self) -> int:
        """Of the batch script; 128 + number if a signal ended it."""
        code, _, signal_number = self.facts()["ExitCode"].partition(":")
        return int(code) or (128 + int(signal_number) if int(signal_number) else 0)

    def wait_for(self, *states: str, timeout_s: float = 120.0) -> str:
        """Until it is in one of these states. Fails as soon as it has ended in another one."""
        return str(self.wait_until(self._in(states), what=" or ".join(states), timeout_s=timeout_s))

    def wait_for_end(self, *, timeout_s: float = 120.0) -> str:
        """Until it has ended, however; the state."""
        return self.wait_for(*ENDED, timeout_s=timeout_s)

    def wait_for_text(self, pattern: str, path: Path | None = None, *, timeout_s: float = 120.0) -> re.Match[str]:
        """Until a file, or the batch script's log, contains what the pattern describes."""

        def find() -> re.Match[str] | None:
            file = path or self.log_path
            return re.search(pattern, file.read_text(errors="replace")) if file.exists() else None

        found = self.wait_until(find, what=f"{pattern!r} in {path or self.log_path}", timeout_s=timeout_s)
        assert isinstance(found, re.Match)
        return found

    def wait_until(self, condition: Callable[[], object], *, what: str, timeout_s: float = 120.0) -> object:
        """The condition's first true value. Fails when the job ends before it, or the time limit passes."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.state()
            # Asked after the state: what a job wrote before it ended is there when it has ended.
            if value := condition():
                return value
            if state in ENDED:
                raise AssertionError(f"job {self.number} is {state}, waited for {what}\n{self.describe()}")
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.number} is {state} after {timeout_s} s, waited for {what}\n{self.describe()}"
                )
            time.sleep(_POLL_S)

    def signal(self, name: str, *, batch_only: bool = True) -> None:
        """Sends a signal to the batch script alone, as --signal=B:NAME does, or to all steps."""
        command("scancel", f"--signal={name}", *(["--batch"] if batch_only else []), self.number)

    def cancel(self) -> None:
        """What a user's scancel does."""
        command("scancel", self.number)

    def describe(self) -> str:
        """For a message: what SLURM knows, and the end of the log."""
        names = ("JobState", "Reason", "ExitCode", "Restarts", "NodeList")
        facts = self.facts()
        return f"{ {name: facts.get(name) for name in names} }\n{self.log_path}:\n{self.log[-6000:]}"

    def _in(self, states: Sequence[str]) -> Callable[[], str | None]:
        def look() -> str | None:
            state = self.state()
            return state if state in states else None

        return look


class Cluster:
    """The SLURM that answers here. What is submitted through it is cancelled by ``clean_up``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Where jobs run and write their logs; all nodes see it."""
        self._jobs: list[Job] = []
        self._crashed: list[str] = []

    def nodes(self) -> list[str]:
        """Names of all nodes, sorted."""
        return sorted(set(command("sinfo", "--noheader", "--Node", "--format=%N").split()))

    def submit(
        self, script: str | Path, *options: str, environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> Job:
        """``sbatch OPTIONS SCRIPT``, as a user in ``directory`` with this project on PYTHONPATH.

        Args:
            script: a path, or the script itself.
            log: what the script's own --output names.
        """
        if isinstance(script, str):
            path = self.directory / f"script-{len(self._jobs)}.sbatch"
            path.write_text(script)
            script = path
        given = [] if log else [f"--output={self.directory}/%j.log", "--open-mode=append"]
        number = command(
            "sbatch", "--parsable", *given, *options, str(script), cwd=self.directory, environment=environment
        ).strip()
        job = Job(number, log=Path(str(log).replace("%j", number)) if log else self.directory / f"{number}.log")
        self._jobs.append(job)
        return job

    def job(self, number: str, *, log: Path) -> Job:
        """A job that something else has submitted."""
        job = Job(number, log=log)
        self._jobs.append(job)
        return job

    def crash(self, node: str, *, noticed: bool = True) -> None:
        """Everything on the node is gone at once; ``noticed``: SLURM need not find out (it takes it half a minute)."""
        self._crashed.append(node)
        sandbox("crash", node)
        if noticed:
            command("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def boot(self, node: str) -> None:
        """Brings a crashed node back."""
        sandbox("boot", node)
        if node in self._crashed:
            self._crashed.remove(node)

    def clean_up(self) -> None:
        """Ends what a test has left: its jobs, at once, and its crashed nodes."""
        for node in list(self._crashed):
            self.boot(node)
        numbers = [job.number for job in self._jobs if job.state() not in ENDED]
        if numbers:
            command("scancel", "--full", "--signal=KILL", *numbers, check=False)
            command("scancel", *numbers, check=False)
        for job in self._jobs:
            job.wait_for_end(timeout_s=60)
        self._jobs.clear()


def answers() -> str:
    """Why no SLURM can be used here; empty if one answers."""
    if shutil.which("sinfo") is None:
        return "sinfo is not installed"
    asked = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60, check=False)
    return (
        ""
        if asked.returncode == 0 and asked.stdout.strip()
        else f"sinfo says: {' '.join(asked.stderr.split()) or 'no nodes'}"
    )


def command(
    *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None, check: bool = True
) -> str:
    """What a command prints; fails with what it says."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=user_environment() | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 or not check, (
        f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def user_environment() -> dict[str, str]:
    """A user's shell on the login node: this Python and this project, and nothing of another launch."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SRUN_", "SBATCH_", "MASTER_", "PYTEST_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def sandbox(*words: str) -> str:
    """One of the sandbox script's commands; the cluster must be one of its own."""
    directory = Path(os.environ["SLURM_CONF"]).parent
    assert (directory / ".slurm-sandbox").exists(), f"{directory} is no sandbox: its nodes are not ours to crash"
    return command(str(SANDBOX), *words, environment={"SLURM_SANDBOX_DIR": str(directory)})
