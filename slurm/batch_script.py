"""Renders the batch script of a run: one bash file that stands alone, and decides what follows when training ends.

#SBATCH options, variables, environment      made here, from a BatchJob and a site profile
train.sbatch                                 the same for every job: the steps, the signals, the decision
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slurm.sites import Site, load_site


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
    """None: an even share of the site's cores; SLURM's default where their number is not known."""
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
    """Variables of the user; they win over the site's. PYTHONPATH follows the snapshot of the code."""
    trainer_flags: tuple[str, ...] = ()
    """Beside ``--config RUN/submit.yaml --resume latest``, which the script gives itself."""
    signal_before_s: int = 300
    """Seconds before the time limit at which the ranks are asked to save."""
    directory: str | None = None
    """Where relative paths of the configuration begin, absolute; None: where sbatch is called."""
    exclude: tuple[str, ...] = ()
    """Nodes the job never runs on, each a name or a pattern of SLURM's."""
    max_restarts: int | None = None
    """None: as often as it takes."""
    crash_delay_s: int = 300
    """How long a job waits after its second crash in a row without progress. It takes the place of SLURM's own delay of
    about two minutes, so it should be longer."""
    preflight: bool = True
    """Whether ``clipyard doctor`` looks at the nodes before training."""
    preflight_flags: tuple[str, ...] = ("--quick", "--arrival-limit", "300")
    """A thousand ranks that read torch from one file system, none of it cached, take minutes to appear."""
    array: str | None = None
    """As for sbatch. Each task is a run of its own: NAME-TASK with ``--seed TASK``, beside the run directory."""
    dependency: str | None = None
    sbatch_options: tuple[str, ...] = ()
    """More ``#SBATCH`` options, each one line: ``--reservation=maintenance``."""
    srun_options: tuple[str, ...] = ()
    """More options of the training step; they follow the site's."""


_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_.+=@:,/-]+")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.+=@:,-]+")
_BODY = Path(__file__).parent / "train.sbatch"
_LEFT_OVER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def render(job: BatchJob) -> str:
    """The batch script of a job.

    Raises:
        ValueError: a value that SLURM or bash would read differently from what it says; an unknown site.
    """
    site = load_site(job.site)
    _check(job, site)
    parts = [
        "#!/usr/bin/env bash",
        *_header(job, site),
        *(f"#SBATCH {option}" for option in sbatch_options(job, site)),
        "",
        *_variables(job, site),
        "",
        *_environment(job, site),
        "",
        _BODY.read_text(),
    ]
    return "\n".join(parts)


def sbatch_options(job: BatchJob, site: Site) -> list[str]:
    """What SLURM is asked for, as options of sbatch."""
    cpus = job.cpus_per_task or site.cpus_per_task(job.tasks_per_node)
    partition = job.partition or site.partition
    gpus = {"gres": f"--gres=gpu:{job.gpus_per_node}", "gpus-per-node": f"--gpus-per-node={job.gpus_per_node}"}
    optional: dict[str, object] = {
        "--cpus-per-task": cpus,
        "--partition": partition,
        "--account": job.account,
        "--exclude": ",".join(job.exclude),
        "--array": job.array,
        "--dependency": job.dependency,
        "--chdir": job.directory,
    }
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *([gpus[site.gpu_request]] if job.gpus_per_node and site.gpu_request in gpus else []),
        *(f"{name}={value}" for name, value in optional.items() if value),
        f"--time={job.time_limit}",
        f"--signal=B:USR1@{job.signal_before_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.run}/slurm/job-%j.log",
        *(option.text for option in site.sbatch_options),
        *job.sbatch_options,
    ]


def _header(job: BatchJob, site: Site) -> list[str]:
    lines = [
        f"{job.name}: {job.nodes} nodes x {job.tasks_per_node} tasks on {site.description}.",
        "",
        f"submit again          sbatch {job.run}/submit.sbatch",
        f"follow                tail -F {job.run}/out.log {job.run}/slurm/job-*.log",
        "save, and start anew  scancel --batch --signal=USR1 JOB",
        f"stop for good         clipyard cancel {job.run}",
        f"                      (or touch {job.run}/.no-requeue, then scancel JOB)",
        "",
        f"USR1 comes {job.signal_before_s} s before the time limit, to this script alone.",
    ]
    return ["#", *(f"# {line}".rstrip() for line in lines), "#"]


def _variables(job: BatchJob, site: Site) -> list[str]:
    """What the rest of the script is told."""
    srun_options = [*(option.text for option in site.srun_options), *job.srun_options]
    lines = [
        f"run={job.run}",
        f"python={shlex.quote(job.python)}",
        f"tasks_per_node={job.tasks_per_node}",
        f"exclude={shlex.quote(','.join(job.exclude))}  # by the user; suspected nodes come on top",
        f"max_restarts={'' if job.max_restarts is None else job.max_restarts}  # none: as often as it takes",
        f"crash_delay_s={job.crash_delay_s}  # what broke may heal: the third start in a row comes later",
        *(f"# {option.why}" for option in site.srun_options),
        f"srun_options=({shlex.join(srun_options)})",
        'trainer=("$python" -u -m training.main --config "$run/submit.yaml" --resume latest '
        f"{shlex.join(job.trainer_flags)})".replace(" )", ")"),
    ]
    look = '"$python" -u -m training.commands.main doctor --slurm --config "$run/submit.yaml" '
    look += shlex.join(job.preflight_flags)
    return [*lines, f"preflight=({look.rstrip() if job.preflight else ''})"]


def _environment(job: BatchJob, site: Site) -> list[str]:
    lines = ["# Of another launch, in the shell that called sbatch.", f"unset {' '.join(_LEFT_OVER)}"]
    for setting in site.setup:
        lines += [f"# {setting.why}", setting.text]
    lines += job.setup
    lines += [
        "# srun does not take it from sbatch any more (22.05 and later): all tasks would share one core.",
        "if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi",
        "# A thousand core files would fill the file system; loader workers have many files open.",
        'ulimit -c 0; ulimit -S -n "$(ulimit -H -n)"',
    ]
    for name, setting in site.environment.items():
        if name not in job.environment:
            value = setting.text.replace("{run}", job.run)
            lines += [f"# {setting.why}", f"export {name}={shlex.quote(value)}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    lines += [
        "# The code as it was when the run was submitted, before the current directory and any path set above.",
        'export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1',
    ]
    return lines


def _check(job: BatchJob, site: Site) -> None:
    """Refuses what sbatch and bash would not read as it stands. sbatch also replaces % in paths."""
    for what, path in (("the run directory", job.run), ("the directory", job.directory)):
        if path is not None and not _PLAIN_PATH.fullmatch(path):
            raise ValueError(
                f"{what} {path!r} cannot stand in a batch script: give an absolute path of letters, digits and "
                "_.+=@:,- (--logs, --name)"
            )
    if not _PLAIN_NAME.fullmatch(job.name):
        raise ValueError(f"--name {job.name!r} cannot name a job: use letters, digits and _.+=@:,-")
    counts = {"--nodes": job.nodes, "--gpus-per-node": job.tasks_per_node, "--signal-before": job.signal_before_s}
    for flag, count in counts.items():
        if count < 1:
            raise ValueError(f"{flag} {count}: give at least 1")
    if site.account_required and not job.account:
        raise ValueError(f"{site.name} charges jobs to an account and none is given: pass --account")
    for text in (*job.sbatch_options, *job.srun_options):
        if not text.startswith("-") or "\n" in text:
            raise ValueError(f"{text!r} is no option of SLURM: it begins with - and is one line")
    words: tuple[str | None, ...] = (
        job.time_limit,
        job.partition,
        job.account,
        job.array,
        job.dependency,
        *job.exclude,
    )
    for word in words:
        if word is not None and not re.fullmatch(r"[A-Za-z0-9_.+=@:,%?\[\]-]+", word):
            raise ValueError(f"{word!r} cannot stand in an option of sbatch: it has blanks, quotes or nothing in it")
