"""What is looked at before anything is submitted: where the run writes, who uses it, and what the job will need.

Each check raises ValueError with what to do, or RuntimeError where this machine cannot submit at all.
"""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from slurm.data_facts import DataFacts, is_on_s3
from slurm.run_record import job_ids
from slurm.snapshot import SOURCE
from slurm.squeue import Job, find_partition, live_jobs
from training.config import Config
from training.data.shards import storage_location
from training.data.storage import AccessDenied, ShardMissing, Storage, StorageError, StorageOptions
from training.resilience.lease import find_owner

_NODE_LOCAL_TYPES = ("tmpfs", "ramfs", "devtmpfs", "overlay")
_NODE_LOCAL_ROOTS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_NODE_LOCAL_VARIABLES = ("TMPDIR", "SLURM_TMPDIR", "JOB_TMPDIR")
_PYTHON_TIMEOUT_S = 120.0
_RESUME_TIMEOUT_S = 300.0
_RESUME_REFUSED = 3
"""Exit code of training/commands/check_resume.py."""
_NEEDED_MODULES = ("torch", "torchvision", "open_clip", "timm", "numpy", "PIL", "yaml", "safetensors", "obstore")


def check_sbatch() -> None:
    """Raises RuntimeError where jobs cannot be submitted."""
    if shutil.which("sbatch") is None:
        raise RuntimeError(
            "there is no sbatch here: run this on a login node of the cluster (perhaps after `module load slurm`), or "
            "pass --dry-run, which prints the script and needs no SLURM."
        )


def check_partition(partition: str | None, *, nodes: int, time_limit_s: int, time_limit: str) -> None:
    """Raises ValueError for what would wait for ever: no such partition, too many nodes, a time limit it forbids."""
    found = find_partition(partition)
    if found is None:
        return
    if nodes > found.nodes:
        raise ValueError(
            f"--nodes {nodes}: partition {found.name} has {found.nodes} nodes, so the job would wait for ever. Pass "
            "fewer, or another --partition."
        )
    if found.time_limit_s is not None and time_limit_s > found.time_limit_s:
        hours, minutes = divmod(found.time_limit_s // 60, 60)
        raise ValueError(
            f"--time {time_limit} is longer than partition {found.name} allows ({hours}:{minutes:02d}:00): pass that "
            "or less (the run goes on in the next job), or another --partition."
        )


def check_shared(run: Path, *, node_local: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError for a run directory that only this machine sees.

    Args:
        node_local: more directories of that kind, from the site's profile.
    """
    reason = why_node_local(run, node_local=node_local, environment=environment)
    if reason is not None:
        raise ValueError(
            f"the run directory {run} is node-local ({reason}): checkpoints would be lost with the node, and other "
            "nodes would not find them. Pass --logs with a directory on the shared file system; if all nodes do see "
            "it, pass --shared-run-directory."
        )


def why_node_local(
    run: Path, *, node_local: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> str | None:
    """What speaks against a shared file system; None if nothing does."""
    resolved = run.resolve()
    for variable in _NODE_LOCAL_VARIABLES:
        value = environment.get(variable)
        if value and resolved.is_relative_to(Path(value).resolve()):
            return f"${variable} is {value}"
    for root in (*_NODE_LOCAL_ROOTS, *node_local):
        if resolved.is_relative_to(root):
            return f"it is under {root}"
    kind = _file_system(resolved)
    return f"its file system is {kind}" if kind in _NODE_LOCAL_TYPES else None


def _file_system(path: Path) -> str:
    """The type of the mount that holds a path; empty if it cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    holding = [mount for mount in mounts if len(mount) > 2 and path.is_relative_to(mount[1].replace("\\040", " "))]
    # Of equally deep mounts the last hides the others.
    return max(enumerate(holding), key=lambda item: (len(item[1][1]), item[0]))[1][2] if holding else ""


def check_writable(run: Path) -> None:
    """Raises ValueError where the run directory cannot be made or written; makes nothing itself."""
    existing = next(parent for parent in (run, *run.parents) if parent.exists())
    try:
        # Permission bits do not tell (quota, read-only mounts): only writing does.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ValueError(
            f"the run directory {run} cannot be written ({error.strerror} in {existing}): pass --logs DIR with a "
            "directory that can."
        ) from error


def check_nobody_uses(run: Path, *, dependency: str | None) -> list[Job]:
    """The jobs of the run that still wait or run, which a ``--dependency`` allows.

    Raises:
        ValueError: there are some, or another process owns the run.
    """
    live = live_jobs(job_ids(run))
    if dependency is not None:
        return live
    if live:
        jobs = ", ".join(f"job {job.job} is {job.state}" for job in live)
        raise ValueError(
            f"run {run.name} is in use: {jobs}. Wait, or `clipyard cancel {run}`; to line up one more job behind it, "
            f"pass --dependency afterany:{live[0].job}; or choose another --name."
        )
    try:
        owner = find_owner(run / "leases")
    except OSError as error:
        raise ValueError(
            f"the leases of run {run} cannot be read ({error.strerror}): choose another --name."
        ) from error
    if owner is not None:
        raise ValueError(
            f"run {run.name} is in use by {owner}, as far as can be seen from here: wait until it has ended, or end "
            "it. If it certainly has, pass `-- --take-over`; or choose another --name."
        )
    return []


def check_python(python: str, *, setup: Sequence[str], modules: Sequence[str] = _NEEDED_MODULES) -> None:
    """Asks the job's interpreter, after the job's own set-up, whether it would find what the trainer imports.

    Raises:
        ValueError: the set-up fails, there is no such interpreter, it is too old, or it lacks a module.
    """
    program = (
        "import sys, importlib.util as u; "
        f"missing = [m for m in {list(modules)!r} if u.find_spec(m) is None]; "
        "print('|'.join(['CLIPYARD', '%d.%d' % sys.version_info[:2], *missing]))"
    )
    script = "\n".join(
        [*(f"{{ {line}\n}} || exit 90" for line in setup), f"{shlex.quote(python)} -c {shlex.quote(program)}"]
    )
    try:
        # A login shell: `module` is a function that only those have.
        done = subprocess.run(
            ["bash", "-lc", script], capture_output=True, text=True, timeout=_PYTHON_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"--python {python} did not answer within {_PYTHON_TIMEOUT_S:.0f} s: try it by hand."
        ) from None
    if done.returncode == 90:
        raise ValueError(
            f"the job's set-up fails here: {_last_line(done.stderr)}. Correct the modules of --site, or --setup."
        )
    answers = [line for line in done.stdout.splitlines() if line.startswith("CLIPYARD|")]
    if done.returncode != 0 or not answers:
        raise ValueError(
            f"the job's interpreter {python} does not run here ({_last_line(done.stderr)}): pass --python PATH with "
            "one that has Clipyard's requirements, or --setup with what brings it."
        )
    _, version, *missing = answers[0].split("|")
    if tuple(map(int, version.split("."))) < (3, 11):
        raise ValueError(f"the job's interpreter {python} is Python {version}: pass --python with 3.11 or newer.")
    if missing:
        raise ValueError(
            f"the job's interpreter {python} lacks {', '.join(missing)}: pass --python with the environment that has "
            "them, --setup with what activates it, or --no-python-check if only compute nodes can tell."
        )


def check_resume(checkpoint: Path, settings: str, *, world_size: int, python: str, setup: Sequence[str]) -> list[str]:
    """Asks the trainer, in the job's interpreter, whether the settings may differ from the checkpoint's as they do.

    Returns:
        A remark where it could not be asked.
    Raises:
        ValueError: the trainer would refuse them.
    """
    words = [python, "-m", "training.commands.check_resume", str(checkpoint), f"--world-size={world_size}"]
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}:{os.environ.get('PYTHONPATH', '')}", "PYTHONSAFEPATH": "1"}
    script = "\n".join([*setup, shlex.join(words)])
    try:
        done = subprocess.run(
            ["bash", "-lc", script],
            input=settings,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_RESUME_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"the settings were not compared with {checkpoint.name}'s: {python} did not answer in time"]
    if done.returncode == _RESUME_REFUSED:
        raise ValueError(f"the run cannot go on from {checkpoint.name} with these settings: {done.stdout.strip()}")
    if done.returncode != 0:
        return [f"the settings were not compared with {checkpoint.name}'s: {_last_line(done.stderr)}"]
    return []


def check_credentials(
    config: Config, data: DataFacts | None, *, now: datetime, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Remarks on credentials for S3: when they expire, and what could not be tried.

    Raises:
        ValueError: they have expired, or the first shard may not be read with them.
    """
    first = data.first_shard if data is not None else None
    remote = config.checkpoint.remote_sync
    if not is_on_s3(first) and not (remote or "").startswith("s3://"):
        return []
    remarks = []
    expires = credentials_expire(environment)
    if expires is not None and expires <= now:
        raise ValueError(
            f"the AWS credentials here expired at {expires.isoformat(timespec='minutes')}: log in again "
            "(`aws sso login`, or new keys) before you submit."
        )
    if expires is not None:
        remarks.append(
            f"the AWS credentials here expire at {expires.isoformat(timespec='minutes')}: a job that runs longer needs "
            "those of its nodes (an instance role)"
        )
    if is_on_s3(first):
        assert first is not None
        remarks += _try_first_shard(config, first)
    return remarks


def credentials_expire(environment: Mapping[str, str]) -> datetime | None:
    """When temporary credentials end, by the environment or ~/.aws/credentials; None if that is not written there."""
    text = environment.get("AWS_CREDENTIAL_EXPIRATION")
    if text is None and "AWS_ACCESS_KEY_ID" not in environment:
        path = environment.get("AWS_SHARED_CREDENTIALS_FILE", str(Path("~/.aws/credentials").expanduser()))
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
        except configparser.Error:
            return None
        profile = environment.get("AWS_PROFILE", "default")
        names = ("expiration", "aws_session_expiration", "x_security_token_expires", "aws_expiration")
        values = [parser.get(profile, name, fallback=None) for name in names]
        text = next((value for value in values if value), None)
    try:
        expires = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return expires if expires is None or expires.tzinfo else expires.replace(tzinfo=UTC)


def _try_first_shard(config: Config, url: str) -> list[str]:
    """Reads the first block, as the trainer would."""
    options = StorageOptions(s3_native=True, attempts=1, connect_timeout_s=5.0, read_timeout_s=10.0)
    if config.data.s3_native == "off":
        return [f"{url} is read by a command (--s3-native off), which was not tried here"]
    try:
        with Storage(options).open(url) as stream:
            stream.read(512)
    except AccessDenied as error:
        raise ValueError(
            f"the first shard may not be read with the credentials here: {error} If the compute nodes have others, "
            "pass --data-elsewhere."
        ) from error
    except ShardMissing as error:
        raise ValueError(f"the first shard does not exist: {error} Correct --train-data.") from error
    except (StorageError, OSError) as error:
        return [f"the first shard, {storage_location(url)}, could not be read from here ({error})"]
    return []


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
