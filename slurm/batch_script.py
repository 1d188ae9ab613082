"""Renders the batch script of a run: one bash file that stands alone, and decides what follows when training ends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BatchJob:
    """What a batch script is made of. Plain values only."""

    name: str
    """Of the run and of the job."""
    run: str
    """The run directory, absolute: LOGS/NAME. It holds submit.yaml, code/ and slurm/ before the job starts."""
    nodes: int
    tasks_per_node: int
    """Ranks: one for each GPU."""
    time_limit: str
    """As sbatch reads it: ``24:00:00``, ``1-00:00:00``, ``90`` (minutes)."""
    gpus_per_node: int = 0
    """Asked of SLURM; 0 asks for none (a job on CPUs, or a cluster that gives whole nodes)."""
    cpus_per_task: int | None = None
    """None: what the site says; without a site's word, SLURM's default."""
    partition: str | None = None
    """None: what the site says."""
    account: str | None = None
    site: str = "generic"
    """A profile in slurm/sites/, or the path of one."""
    python: str = "python"
    """The interpreter that runs the trainer; absolute, unless the site's modules or ``setup`` bring it."""
    setup: tuple[str, ...] = ()
    """Shell lines before anything of ours runs: modules, ``source .../activate``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the user; they win over the site's."""
    trainer_flags: tuple[str, ...] = ()
    """Beside ``--config RUN/submit.yaml --resume latest``, which the script gives itself."""
    signal_before_s: int = 300
    """Seconds before the time limit at which the ranks are asked to save."""
    exclude: tuple[str, ...] = ()
    """Nodes the job never runs on, each a name or a pattern of SLURM's."""
    max_restarts: int | None = None
    """None: as often as it takes."""
    preflight: bool = True
    """Whether ``clipyard doctor`` looks at the nodes before training."""
    preflight_flags: tuple[str, ...] = ("--quick",)
    array: str | None = None
    """As for sbatch. Each task is a run of its own: NAME-TASK with ``--seed TASK``, beside the run directory."""
    dependency: str | None = None
    sbatch_options: tuple[str, ...] = ()
    """More ``#SBATCH`` options, each one line: ``--reservation=maintenance``."""
    srun_options: tuple[str, ...] = ()
    """More options of the training step; they follow the site's."""


def render(job: BatchJob) -> str:
    """The batch script of a job."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        f"--time={job.time_limit}",
        f"--output={job.run}/slurm/job-%j.log",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{job.signal_before_s}",
        *job.sbatch_options,
    ]
    lines = [f"#SBATCH {option}" for option in options]
    run = shlex.quote(job.run)
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "set -u",
            f"run={run}",
            'export PYTHONPATH="$run/code"',
            f'srun --kill-on-bad-exit=1 --output="$run/slurm/rank-%5t.log" --open-mode=append {shlex.quote(job.python)} '
            '-m training.main --config "$run/submit.yaml" --resume latest',
            "",
        ]
    )
