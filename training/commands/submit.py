"""``clipyard submit CONFIG [options] [-- trainer flags]``: checks a run, says what it needs, and submits it to SLURM.

    clipyard submit configs/runs/vit-b-32-256-jureca.yaml --site jureca --nodes 24 --account ABC --time 24:00:00
    clipyard submit run.yaml --nodes 2 --dry-run -- --lr 1e-3

Needs no torch: it runs on a login node.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime

from slurm.launch import Request, Send, Submission, prepare, send_with_sbatch, submit
from slurm.plan import GPUS, Assumptions

_PROGRAM = "clipyard submit"


def main(argv: Sequence[str]) -> int:
    """Exit code 2 for what the user can change, 1 where the cluster refuses."""
    own, trainer_flags = _split(argv)
    arguments = build_parser().parse_args(own)
    now = datetime.now().astimezone()
    try:
        submission = prepare(make_request(arguments, trainer_flags), now=now)
        sys.stdout.write(submission.summary)
        if arguments.dry_run:
            sys.stdout.write(
                f"\n--dry-run: nothing is written or submitted. {submission.run}/submit.sbatch would be:\n\n"
            )
            sys.stdout.write(submission.script)
            return 0
        job_id = submit(submission, send=_sender(arguments.submit_with), now=now)
    except ValueError as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        return 1
    sys.stdout.write(_what_next(submission, job_id))
    return 0


def make_request(arguments: argparse.Namespace, trainer_flags: Sequence[str]) -> Request:
    """What the command line asks for.

    Raises:
        ValueError: a value that is none.
    """
    trainer = [*(f"--config={file}" for file in arguments.config), *trainer_flags]
    trainer += [f"--name={arguments.name}"] if arguments.name is not None else []
    trainer += [f"--logs={arguments.logs}"] if arguments.logs is not None else []
    return Request(
        tuple(trainer),
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.tasks_per_node,
        cpus_per_task=arguments.cpus_per_task,
        global_batch=arguments.global_batch,
        time_limit=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        site=arguments.site,
        exclude=tuple(arguments.exclude),
        array=arguments.array,
        dependency=arguments.dependency,
        signal_before_s=arguments.signal_before,
        checkpoint_minutes=arguments.checkpoint_minutes,
        max_restarts=arguments.max_restarts,
        python=arguments.python,
        setup=tuple(arguments.setup),
        environment=_pairs(arguments.env),
        sbatch_options=tuple(_options(arguments.sbatch_option, "--sbatch-option")),
        srun_options=tuple(_options(arguments.srun_option, "--srun-option")),
        preflight=not arguments.no_preflight,
        assumptions=Assumptions(
            gpu=arguments.gpu,
            mfu=_share(arguments.mfu),
            sample_kb=_positive(arguments.sample_kb, "--sample-kb"),
            storage_gb_per_s=_positive(arguments.storage_gb_per_s, "--storage-gb-per-s"),
        ),
        shared_run_directory=arguments.shared_run_directory,
        data_elsewhere=arguments.data_elsewhere,
        python_check=not arguments.no_python_check,
        cluster_checks=not arguments.dry_run,
    )


def build_parser() -> argparse.ArgumentParser:
    """Every option; those of the trainer come behind ``--``."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} CONFIG [CONFIG ...] [options] [-- trainer flags]",
        description="Checks a run, plans it and submits it to SLURM as one script that requeues itself.",
        epilog="More: docs/submitting.md.",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="*", help="run files (YAML, keys = trainer flags); later ones win")
    job = parser.add_argument_group("job")
    job.add_argument("--nodes", type=int, help="nodes; 1 unless given")
    job.add_argument("--gpus", type=int, help="GPUs in all, instead of --nodes")
    job.add_argument("--gpus-per-node", type=int, help="the site's, unless given")
    job.add_argument("--tasks-per-node", type=int, help="ranks a node, for --device cpu")
    job.add_argument("--cpus-per-task", type=int, help="cores of a rank; the site's, unless given")
    job.add_argument("--global-batch", type=int, help="samples a step; sets --batch-size for the number of ranks")
    job.add_argument("--time", default="24:00:00", help="limit of one job (%(default)s); the run goes on in the next")
    job.add_argument("--partition", help="of SLURM; the site's, unless given")
    job.add_argument("--account", help="that pays")
    job.add_argument("--site", default="generic", help="profile in slurm/sites/, or a file (%(default)s)")
    job.add_argument("--exclude", action="append", default=[], metavar="NODES", help="never on these; may be repeated")
    job.add_argument("--array", help="as for sbatch; each task is a run NAME-TASK with seed TASK")
    job.add_argument("--dependency", help="as for sbatch, such as afterany:4711")
    job.add_argument("--name", help="of the run and of the job; as the trainer's --name")
    job.add_argument("--logs", help="directory of all runs; as the trainer's --logs")
    job.add_argument(
        "--sbatch-option", action="append", default=[], metavar="OPTION", help="more: --sbatch-option=--qos=high"
    )
    job.add_argument("--srun-option", action="append", default=[], metavar="OPTION", help="more for the training step")
    keep = parser.add_argument_group("checkpoints and restarts")
    keep.add_argument(
        "--signal-before", type=int, metavar="S", help="seconds before the limit to save at; else worked out"
    )
    keep.add_argument("--checkpoint-minutes", type=float, metavar="M", help="between saves; 0: as the run file says")
    keep.add_argument("--max-restarts", type=int, metavar="N", help="requeues before it stops; no limit unless given")
    keep.add_argument("--no-preflight", action="store_true", help="train without `clipyard doctor` first")
    start = parser.add_argument_group("what the job runs in")
    start.add_argument("--python", default=sys.executable, help="interpreter of the job (%(default)s)")
    start.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell line before it; may be repeated"
    )
    start.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="variable; may be repeated")
    plan = parser.add_argument_group("assumptions of the plan")
    plan.add_argument("--gpu", default="a100-40", choices=sorted(GPUS), help="kind of GPU (%(default)s)")
    plan.add_argument("--mfu", type=float, default=0.2, help="share of its peak that is reached (%(default)s)")
    plan.add_argument("--sample-kb", type=float, default=40.0, help="of remote shards, per sample (%(default)s)")
    plan.add_argument("--storage-gb-per-s", type=float, default=1.0, help="for checkpoints (%(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print plan and script; write and ask nothing")
    how.add_argument(
        "--with", dest="submit_with", choices=("sbatch", "submitit"), default="sbatch", help="(%(default)s)"
    )
    how.add_argument("--shared-run-directory", action="store_true", help="all nodes see it, whatever it looks like")
    how.add_argument("--data-elsewhere", action="store_true", help="only compute nodes see the training data")
    how.add_argument("--no-python-check", action="store_true", help="only compute nodes have the job's interpreter")
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our arguments, the trainer's behind ``--``)."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def _sender(name: str) -> Send:
    if name == "sbatch":
        return send_with_sbatch
    # Here and not above: a login node that never asks for it need not have submitit.
    from slurm.submitit_executor import send_with_submitit

    return send_with_submitit


def _pairs(items: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env {item!r} is not NAME=VALUE: write a variable's name, =, and its value.")
        pairs[name] = value
    return pairs


def _options(items: Sequence[str], flag: str) -> list[str]:
    for item in items:
        if not item.startswith("-") or "\n" in item:
            raise ValueError(f"{flag} {item!r} is no option: write it as {flag}=--NAME=VALUE.")
    return list(items)


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"--mfu {value} must be more than 0 and at most 1, such as 0.2.")
    return value


def _positive(value: float, flag: str) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{flag} {value} must be more than 0.")
    return value


def _what_next(submission: Submission, job_id: str) -> str:
    run = shlex.quote(str(submission.run))
    return (
        f"\nSubmitted job {job_id}.\n"
        f"  follow   clipyard logs {run} --follow        clipyard status {run}\n"
        f"  stop     clipyard cancel {run}               (scancel alone would look like a preemption, and requeue)\n"
        f"  again    sbatch {run}/submit.sbatch\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
