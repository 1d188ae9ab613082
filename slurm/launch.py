"""Turns a request into a job: checks the settings with the trainer's own code, plans, renders, submits. No torch.

flags, run file -> Config -> plan -> BatchJob -> script -> RUN/{submit.yaml, submit.sbatch, code/} -> sbatch
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurm import checks
from slurm.bad_nodes import BAD_NODES_FILE, choose_excluded, read_suspects, usable_nodes
from slurm.batch_script import BatchJob, render
from slurm.data_facts import DataFacts, read_data_facts
from slurm.model_facts import find_facts
from slurm.node_list import expand
from slurm.plan import Assumptions, JobShape, Plan, make_plan, saves_within_epochs
from slurm.run_record import (
    NO_REQUEUE_NAME,
    SCRIPT_NAME,
    SETTINGS_NAME,
    array_runs,
    newest_checkpoint,
    newest_step,
    read_submission,
    write_submission,
)
from slurm.sites import Site, load_site
from slurm.snapshot import code_digest, snapshot_digest, take_snapshot
from slurm.squeue import find_partition, parse_time_s
from slurm.summary import summarise
from training.cli import parse, to_yaml
from training.config import Config
from training.data.epoch import has_train_data
from training.naming import default_name
from training.phases import read_phases
from training.validation import logs_disabled

# Both become part of #SBATCH lines, where quotes and % have a meaning of their own.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_DIRECTORY = re.compile(r"[^\s%'\"\\]+")


_MINUTES_IF_UNKNOWN = 30
"""Between checkpoints of a model whose size is not known."""


@dataclass(frozen=True)
class Request:
    """What a user asks for; None is left to the site, or worked out."""

    trainer_arguments: tuple[str, ...]
    """As for ``python -m training.main``."""
    nodes: int | None = None
    gpus: int | None = None
    """In all, instead of nodes."""
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    """For jobs without GPUs."""
    cpus_per_task: int | None = None
    global_batch: int | None = None
    time_limit: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    site: str = "generic"
    exclude: tuple[str, ...] = ()
    array: str | None = None
    dependency: str | None = None
    signal_before_s: int | None = None
    checkpoint_minutes: float | None = None
    max_restarts: int | None = None
    python: str = sys.executable
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    sbatch_options: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    preflight: bool = True
    assumptions: Assumptions = field(default_factory=Assumptions)
    shared_run_directory: bool = False
    """The user says that all nodes see it."""
    data_elsewhere: bool = False
    """The user says that only compute nodes see the data."""
    python_check: bool = True
    cluster_checks: bool = True
    """What asks SLURM and other processes; off for ``--dry-run``."""


@dataclass(frozen=True)
class Submission:
    """A job that is ready to be submitted; nothing is written yet."""

    job: BatchJob
    config: Config
    plan: Plan
    script: str
    settings: str
    """The content of submit.yaml."""
    summary: str
    live_jobs: tuple[str, ...] = ()
    """Of this run, which the new one waits for."""
    suspects: tuple[str, ...] = ()
    """Nodes that its first start avoids; the script itself sees to the later ones."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.job.run)


def prepare(request: Request, *, now: datetime) -> Submission:
    """Checks everything that can be checked from here.

    Raises:
        ValueError: a setting, or the run directory, which the user can change.
        RuntimeError: this machine cannot submit jobs.
    """
    if request.cluster_checks:
        checks.check_sbatch()
    _check_options(request)
    parsed = parse(list(request.trainer_arguments))
    site = load_site(request.site)
    if site.account_required and request.account is None:
        raise ValueError(f"--account is missing: site {site.name} wants to know who pays. Pass --account NAME.")
    shape = _shape(request, parsed.config, site=site)
    config = _with_batch(_with_place(parsed.config, now=now), request, shape)
    run = Path(config.logging.logs) / str(config.logging.name)
    live, remarks = _check_place(request, run, shape, site=site)
    data, data_remarks = _look_at_data(request, config, now=now)
    first_step = newest_step(run)
    plan = _plan(config, shape, request, data=data, first_step=first_step)
    config, interval_remarks = _with_interval(config, request, plan)
    job, assumed = _batch_job(request, config, plan, run, site=site)
    script = render(job)
    settings = _settings(config, now)
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None and request.cluster_checks and request.python_check:
        remarks += checks.check_resume(
            checkpoint,
            settings,
            world_size=shape.world_size,
            python=request.python,
            setup=_setup_lines(request, site),
        )
    suspects = _suspects(request, run, shape, site=site, now=now) if request.cluster_checks else []
    if suspects:
        remarks.append(f"the first start avoids suspected nodes: {', '.join(suspects)} (bad_nodes.jsonl)")
    summary = summarise(
        job,
        config,
        plan,
        data=data,
        assumptions=request.assumptions,
        first_step=first_step,
        assumed=assumed,
        remarks=(*parsed.notices, *remarks, *data_remarks, *interval_remarks),
    )
    return Submission(job, config, plan, script, settings, summary, tuple(live), tuple(suspects))


Send = Callable[[Path, BatchJob, Sequence[str]], str]
"""Hands (script, job, more options of sbatch) to SLURM; returns the job's number."""


def submit(submission: Submission, *, send: Send, now: datetime) -> str:
    """Writes the run directory and hands the script to SLURM; returns the job's number.

    Raises:
        ValueError: jobs of this run wait for other code or settings. RuntimeError: SLURM refuses the job.
    """
    run = submission.run
    if submission.live_jobs:
        _check_unchanged(submission)
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    digest = take_snapshot(run)
    (run / SETTINGS_NAME).write_text(submission.settings)
    script = run / SCRIPT_NAME
    script.write_text(submission.script)
    script.chmod(0o755)
    # Whoever submits a run again wants it to go on, also after they have cancelled it.
    for place in _cancelled(run):
        (place / NO_REQUEUE_NAME).unlink(missing_ok=True)
    excluded = [*submission.job.exclude, *submission.suspects] if submission.suspects else []
    job_id = send(script, submission.job, [f"--exclude={','.join(excluded)}"] if excluded else [])
    earlier = [str(job) for job in read_submission(run).get("job_ids", ())]
    write_submission(run, _record(submission, [*earlier, job_id], digest=digest, now=now))
    return job_id


def send_with_sbatch(script: Path, job: BatchJob, options: Sequence[str] = ()) -> str:
    """Submits a script as it is.

    Raises:
        RuntimeError: sbatch refuses it.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise RuntimeError("there is no sbatch here: run this on a login node of the cluster.")
    done = subprocess.run([program, "--parsable", *options, str(script)], capture_output=True, text=True, check=False)
    # NUMBER, or NUMBER;CLUSTER.
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        raise RuntimeError(
            f"sbatch refused {script}: {(done.stderr or done.stdout).strip()}. The file is as it was sent; correct the "
            "option it names (--partition, --account, --time, --nodes, --sbatch-option)."
        )
    return number


def _check_options(request: Request) -> None:
    """
    Raises:
        ValueError: what sbatch or the script would stumble over later.
    """
    if request.max_restarts is not None and request.max_restarts < 0:
        raise ValueError(f"--max-restarts {request.max_restarts} must be at least 0; leave it out for no limit.")
    if request.cpus_per_task is not None and request.cpus_per_task < 1:
        raise ValueError(f"--cpus-per-task {request.cpus_per_task} must be at least 1; leave it out for the site's.")
    for nodes in request.exclude:
        try:
            expand(nodes)
        except ValueError as error:
            raise ValueError(f"--exclude {nodes}: {error}") from error
    if not _DIRECTORY.fullmatch(os.getcwd()):
        raise ValueError(
            f"the working directory {os.getcwd()!r}: sbatch gives spaces, quotes and % a meaning of their own, and the "
            "job would start there. Call submit in another."
        )


def _shape(request: Request, config: Config, *, site: Site) -> JobShape:
    """
    Raises:
        ValueError: GPUs that cannot be divided among nodes, or numbers that contradict each other.
    """
    on_gpu = config.engine.device.startswith("cuda")
    per_node = _tasks_per_node(request, on_gpu=on_gpu, site_gpus=site.gpus_per_node)
    nodes = request.nodes
    if request.gpus is not None:
        whole = request.gpus // per_node
        if request.gpus < 1 or request.gpus % per_node:
            raise ValueError(
                f"--gpus {request.gpus} cannot be divided among nodes of {per_node}: pass a multiple, "
                f"{max(whole, 1) * per_node} or {(max(whole, 0) + 1) * per_node}, or another --gpus-per-node."
            )
        if nodes is not None and nodes * per_node != request.gpus:
            raise ValueError(
                f"--gpus {request.gpus} is not --nodes {nodes} x {per_node} a node = {nodes * per_node}: leave one out."
            )
        nodes = whole
    nodes = 1 if nodes is None else nodes
    if nodes < 1:
        raise ValueError(f"--nodes {nodes} must be at least 1.")
    return JobShape(nodes, per_node, parse_time_s(request.time_limit), request.signal_before_s)


def _tasks_per_node(request: Request, *, on_gpu: bool, site_gpus: int | None) -> int:
    gpus = request.gpus_per_node
    if not on_gpu:
        if gpus:
            raise ValueError(f"--gpus-per-node {gpus}, but --device cpu uses none: leave one out, or --tasks-per-node.")
        tasks = 1 if request.tasks_per_node is None else request.tasks_per_node
    else:
        if gpus is None and site_gpus is None and request.tasks_per_node is None:
            raise ValueError(f"--gpus-per-node is missing, and site {request.site} does not say it: pass it.")
        if gpus is not None and site_gpus is not None and gpus > site_gpus:
            raise ValueError(
                f"--gpus-per-node {gpus}: nodes of site {request.site} have {site_gpus}. Pass {site_gpus} or less."
            )
        gpus = gpus if gpus is not None else site_gpus
        tasks = request.tasks_per_node if request.tasks_per_node is not None else gpus or 0
        if gpus and tasks != gpus:
            raise ValueError(
                f"--tasks-per-node {tasks} is not --gpus-per-node {gpus}: a rank has one GPU, leave it out."
            )
    if tasks < 1:
        raise ValueError(f"{tasks} ranks a node: pass --gpus-per-node or --tasks-per-node with at least 1.")
    return tasks


def _with_place(config: Config, *, now: datetime) -> Config:
    """With a name and an absolute directory: every start of the job must find the same run.

    Raises:
        ValueError: no directory, or a name that a batch script cannot hold.
    """
    if logs_disabled(config.logging.logs):
        raise ValueError(f"--logs {config.logging.logs} keeps no checkpoints to requeue from: pass --logs DIR.")
    if config.checkpoint.resume not in (None, "latest"):
        raise ValueError(
            f"--resume {config.checkpoint.resume}: every start of the job would begin there again, so jobs resume from "
            "`latest` only. Pass --branch-from RUN@STEP, --pretrained FILE, or --remote-sync for a mirrored run."
        )
    name = config.logging.name or default_name(config, date=now.astimezone())
    logs = os.path.abspath(os.path.expanduser(config.logging.logs))
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name {name!r}: pass one of letters, digits and ._=+- only, beginning with one of the first."
        )
    if not _DIRECTORY.fullmatch(logs):
        raise ValueError(f"--logs {logs!r}: sbatch gives spaces, quotes and % a meaning of their own. Pass another.")
    return replace(
        config,
        logging=replace(config.logging, name=name, logs=logs),
        checkpoint=replace(config.checkpoint, resume="latest"),
    )


def _with_batch(config: Config, request: Request, shape: JobShape) -> Config:
    if request.global_batch is None:
        return config
    slots = shape.world_size * config.engine.accum_freq
    batch, rest = divmod(request.global_batch, slots)
    if rest or not batch:
        raise ValueError(
            f"--global-batch {request.global_batch} cannot be divided among {shape.world_size} ranks x "
            f"{config.engine.accum_freq} micro-steps: pass {max(batch, 1) * slots} or {(batch + 1) * slots}, or "
            "another number of nodes."
        )
    return replace(config, data=replace(config.data, batch_size=batch))


def _check_place(request: Request, run: Path, shape: JobShape, *, site: Site) -> tuple[list[str], list[str]]:
    """(jobs of the run that live, remarks). The run directory, its owner, the partition and the interpreter."""
    if not request.shared_run_directory:
        checks.check_shared(run, node_local=site.node_local)
    checks.check_writable(run)
    remarks = []
    if _cancelled(run):
        remarks.append(f"the run was cancelled: {NO_REQUEUE_NAME} is removed, and it will requeue again")
    if not request.cluster_checks:
        return [], remarks
    live = checks.check_nobody_uses(run, dependency=request.dependency)
    checks.check_partition(
        request.partition or site.partition,
        nodes=shape.nodes,
        time_limit_s=shape.time_limit_s,
        time_limit=request.time_limit,
    )
    if request.python_check:
        checks.check_python(request.python, setup=_setup_lines(request, site))
    return [job.job for job in live], remarks


def _cancelled(run: Path) -> list[Path]:
    """The run, and the runs of an array's tasks, as far as they may not start again."""
    return [place for place in (run, *array_runs(run)) if (place / NO_REQUEUE_NAME).exists()]


def _setup_lines(request: Request, site: Site) -> tuple[str, ...]:
    return (*(line.text for line in site.setup), *request.setup)


def _suspects(request: Request, run: Path, shape: JobShape, *, site: Site, now: datetime) -> list[str]:
    found = read_suspects(run / BAD_NODES_FILE, now=now)
    partition = find_partition(request.partition or site.partition) if found else None
    if partition is None:
        return []
    return choose_excluded(found, usable=usable_nodes(partition.name), needed=shape.nodes, always=request.exclude)


def _look_at_data(request: Request, config: Config, *, now: datetime) -> tuple[DataFacts | None, list[str]]:
    if not has_train_data(config.data):
        return None, []
    try:
        data = read_data_facts(config.data, visible=not request.data_elsewhere)
    except ValueError as error:
        raise ValueError(
            f"{error} If only the compute nodes see the data, pass --data-elsewhere and --train-num-samples."
            if not request.data_elsewhere
            else str(error)
        ) from error
    if request.data_elsewhere or not request.cluster_checks:
        return data, []
    return data, checks.check_credentials(config, data, now=now)


def _plan(config: Config, shape: JobShape, request: Request, *, data: DataFacts | None, first_step: int) -> Plan:
    return make_plan(
        config,
        shape,
        data=data,
        model=find_facts(config.model),
        assumptions=request.assumptions,
        phases=read_phases(config),
        first_step=first_step,
    )


def _with_interval(config: Config, request: Request, plan: Plan) -> tuple[Config, list[str]]:
    """With checkpoints between the ends of epochs, unless the user has decided that, or epochs are short."""
    minutes = request.checkpoint_minutes
    if minutes is not None and not 0 <= minutes < math.inf:
        raise ValueError(f"--checkpoint-minutes {minutes} must be at least 0; 0 saves as the run file says.")
    if plan.steps is None or minutes == 0:
        return config, []
    remark = ""
    if minutes is None:
        minutes = plan.checkpoints.minutes if plan.checkpoints else _MINUTES_IF_UNKNOWN
        epoch_min = plan.steps.per_epoch * plan.speed.step_s / 60 if plan.speed else None
        if saves_within_epochs(config) or (epoch_min is not None and epoch_min <= minutes):
            return config, []
        reason = (
            "how long an epoch takes is not known here"
            if epoch_min is None
            else f"checkpoints only at the ends of epochs would cost {epoch_min / 2:.0f} minutes at every crash"
        )
        remark = (
            f"{reason}, so submit adds save-every-n-minutes: {minutes} (--checkpoint-minutes, 0 to leave it as it was)"
        )
    config = replace(config, checkpoint=replace(config.checkpoint, save_every_n_minutes=float(minutes)))
    return config, [remark] if remark else []


def _batch_job(
    request: Request, config: Config, plan: Plan, run: Path, *, site: Site
) -> tuple[BatchJob, tuple[str, ...]]:
    """(the job, what it assumes)."""
    on_gpu = config.engine.device.startswith("cuda")
    cpus, assumed = _cpus_per_task(request, config, plan, site=site)
    job = BatchJob(
        name=str(config.logging.name),
        run=str(run),
        nodes=plan.shape.nodes,
        tasks_per_node=plan.shape.tasks_per_node,
        time_limit=request.time_limit,
        gpus_per_node=plan.shape.tasks_per_node if on_gpu and request.gpus_per_node != 0 else 0,
        cpus_per_task=cpus,
        directory=os.getcwd(),  # where relative paths among the settings begin, wherever the script is sent from
        partition=request.partition,
        account=request.account,
        site=request.site,
        python=request.python,
        setup=request.setup,
        environment=request.environment,
        signal_before_s=plan.signal_before_s,
        exclude=request.exclude,
        max_restarts=request.max_restarts,
        preflight=request.preflight,
        array=request.array,
        dependency=request.dependency,
        sbatch_options=request.sbatch_options,
        srun_options=request.srun_options,
    )
    return job, assumed


def _cpus_per_task(request: Request, config: Config, plan: Plan, *, site: Site) -> tuple[int | None, tuple[str, ...]]:
    """(what to ask for, what that assumes). Asked for nothing, SLURM gives a rank and its workers one core."""
    options = (*(option.text for option in site.sbatch_options), *request.sbatch_options)
    said = any(option.startswith(("--cpus-per-", "-c")) for option in options)
    if request.cpus_per_task is not None or said or site.cpus_per_task(plan.shape.tasks_per_node) is not None:
        return request.cpus_per_task, ()
    cpus = config.data.workers + 1
    return cpus, (f"{cpus} cores a rank, one for it and one for each of its workers (--cpus-per-task)",)


def _settings(config: Config, now: datetime) -> str:
    return (
        f"# The settings of run {config.logging.name}, written by `clipyard submit` at "
        f"{now.isoformat(timespec='seconds')}.\n"
        "# submit.sbatch passes them with --config; submit again to change them.\n"
        f"{to_yaml(config)}"
    )


def _check_unchanged(submission: Submission) -> None:
    """Raises ValueError where jobs that wait or run would get other code or settings under their feet."""
    run = submission.run
    jobs = ", ".join(submission.live_jobs)
    if snapshot_digest(run) != code_digest():
        raise ValueError(
            f"the code has changed since job {jobs} was submitted, and that job uses {run / 'code'}: wait for its end, "
            "cancel it, or choose another --name."
        )
    path = run / SETTINGS_NAME
    if not path.is_file() or _without_comments(path.read_text()) != _without_comments(submission.settings):
        raise ValueError(
            f"the settings differ from those of job {jobs}, in {path}: wait for its end, cancel it, or choose another "
            "--name."
        )


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def _record(submission: Submission, job_ids: list[str], *, digest: str, now: datetime) -> dict[str, Any]:
    job, plan = submission.job, submission.plan
    return {
        "job_ids": job_ids,
        "submitted": now.astimezone(UTC).isoformat(timespec="seconds"),
        "name": job.name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
        "tasks_per_node": job.tasks_per_node,
        "world_size": plan.shape.world_size,
        "global_batch": plan.steps.global_batch if plan.steps else None,
        "steps_per_epoch": plan.steps.per_epoch if plan.steps else None,
        "steps": plan.steps.total if plan.steps else None,
        "time_limit": job.time_limit,
        "signal_before_s": job.signal_before_s,
        "partition": job.partition,
        "account": job.account,
        "site": job.site,
        "array": job.array,
        "dependency": job.dependency,
        "code": digest,
    }
