"""``clipyard checkpoints``: lists, verifies, exports, averages and mirrors the checkpoints of a run.

RUN is a run's directory, its ``checkpoints`` directory, or where it is mirrored (URL/NAME).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from training.checkpoint.average import average_weights
from training.checkpoint.export import epoch_content
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_fetch import CHECKPOINTS
from training.checkpoint.mirror_store import open_store
from training.checkpoint.tags import Tags
from training.commands.checkpoint_output import write_torch, write_weights
from training.commands.checkpoint_source import (
    Checkpoints,
    Weights,
    choose_step,
    find_damages,
    newest,
    open_checkpoints,
    open_weights,
)
from training.data.storage_errors import StorageError
from training.resilience.lease import find_owner

HEADER = ("step", "epoch", "samples", "size", "age", "format", "start", "tags", "state")
LEASES = "leases"


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """One line per checkpoint."""
    checkpoints = open_checkpoints(arguments.run)
    rows = [HEADER, *(_row(checkpoints, step, read=arguments.verify) for step in checkpoints.steps())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[:7], widths[:7], strict=True))
        sys.stdout.write("  ".join((*numbers, row[7].ljust(widths[7]), row[8])) + "\n")
    return 0


def _row(checkpoints: Checkpoints, step: int, *, read: bool) -> tuple[str, ...]:
    tags = _tag_names(checkpoints.tags(), step)
    try:
        manifest, train = checkpoints.manifest(step), checkpoints.train(step)
    except (DamagedCheckpoint, StorageError, ValueError) as damage:
        return (str(step), *["-"] * 6, tags, f"DAMAGED: {damage}")
    damages = find_damages(checkpoints, step) if read else []
    age_s = checkpoints.age_s(step)
    return (
        str(step),
        str(train.get("epoch", "-")),
        f"{train['samples_seen']:,}" if "samples_seen" in train else "-",
        _size(sum(facts.size for facts in manifest.files.values())),
        "-" if age_s is None else _duration(age_s),
        "1" if manifest.world_size == 0 else "3" if manifest.shard_ranks > 1 else "2",
        str(manifest.generation) if manifest.world_size else "-",
        tags,
        f"DAMAGED: {damages[0]}" if damages else ("verified" if read else "complete"),
    )


def _tag_names(tags: Tags, step: int) -> str:
    best = tags.best is not None and tags.best.step == step
    names = ["good"] * (step in tags.good) + ["suspect"] * (step in tags.suspect)
    if best and tags.best is not None:
        names.append(f"best({tags.best.metric} {tags.best.value:.4g})")
    return ",".join(names) or "-"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """Reads everything; 1 if anything is damaged."""
    checkpoints = open_checkpoints(arguments.run)
    steps = checkpoints.steps() if arguments.step is None else [choose_step(checkpoints, arguments.step)]
    damaged = 0
    for step in steps:
        damages = find_damages(checkpoints, step)
        damaged += bool(damages)
        sys.stdout.write(f"step {step}: {'DAMAGED' if damages else 'whole'}\n")
        for damage in damages:
            sys.stdout.write(f"  {damage}\n")
    return 1 if damaged else 0


def export_checkpoint(arguments: argparse.Namespace) -> int:
    """Writes the weights of one checkpoint for OpenCLIP."""
    checkpoints, out = open_checkpoints(arguments.run), arguments.out
    if arguments.with_optimizer and out.suffix != ".pt":
        raise ValueError("--with-optimizer: only a .pt file has a place for the optimizer's state")
    step = choose_step(checkpoints, arguments.step)
    with open_weights(checkpoints, step, with_optimizer=arguments.with_optimizer) as found:
        if arguments.with_optimizer:
            write_torch(out, epoch_content(found.directory, name=checkpoints.name))
        else:
            write_weights(out, found.weights, found.train, name=checkpoints.name)
    sys.stdout.write(f"step {step} of {checkpoints.name} -> {out}\n")
    return 0


def average_checkpoints(arguments: argparse.Namespace) -> int:
    """Writes the mean of several checkpoints' weights for OpenCLIP."""
    checkpoints = open_checkpoints(arguments.run)
    if arguments.steps is not None:
        steps = sorted({choose_step(checkpoints, step) for step in arguments.steps.split(",")})
    else:
        steps = newest(checkpoints, arguments.last)
    with _open_all(checkpoints, steps) as models:
        names = [f"step {step}" for step in steps]
        weights = average_weights([model.weights for model in models], names=names)
        write_weights(arguments.out, weights, models[-1].train, name=checkpoints.name)
    sys.stdout.write(f"mean of {', '.join(names)} of {checkpoints.name} -> {arguments.out}\n")
    return 0


@contextmanager
def _open_all(checkpoints: Checkpoints, steps: Sequence[int]) -> Iterator[list[Weights]]:
    with ExitStack() as stack:
        yield [stack.enter_context(open_weights(checkpoints, step)) for step in steps]


def mirror_run(arguments: argparse.Namespace) -> int:
    """Uploads what is not there yet, once; deletes nothing.

    Raises:
        ValueError: the run goes on. Its own mirror would stop, since two of them do not share a place.
    """
    open_checkpoints(arguments.run)
    if "://" in arguments.run:
        raise ValueError(f"{arguments.run} is a mirror already: pass the directory of a run")
    given = Path(arguments.run)
    run = given if (given / CHECKPOINTS).is_dir() else given.resolve().parent
    owner = find_owner(run / LEASES)
    if owner is not None and not arguments.take_over:
        raise ValueError(
            f"{run} is in use by {owner}: train with --remote-sync, or wait until the run has ended. If it certainly "
            "has, and this machine cannot see that, pass --take-over."
        )
    mirror = Mirror(run, open_store(arguments.url, protocol=arguments.protocol), deletes=False)
    mirror.check(continues=True)
    complete = mirror.upload_once(final=True)
    status = mirror.status
    sys.stdout.write(f"{status.files} files, {_size(status.bytes)} uploaded to {arguments.url}\n")
    if not complete:
        sys.stderr.write(f"clipyard checkpoints mirror: not complete: {status.last_error}\n")
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipyard checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, action: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("run", metavar="RUN", help="a run's directory, its checkpoints directory, or URL/NAME")
        command.set_defaults(action=action)
        return command

    listing = add("list", list_checkpoints, "steps, sizes, ages and tags; damaged and suspect ones are marked")
    listing.add_argument("--verify", action="store_true", help="read every byte, not only sizes")
    verifying = add("verify", verify_checkpoints, "read every byte; exit code 1 if a checkpoint is damaged")
    verifying.add_argument("--step", help="only this one: a number, latest or best")
    exporting = add("export", export_checkpoint, "write weights that OpenCLIP loads")
    exporting.add_argument("out", metavar="OUT", type=Path, help="NAME.pt, NAME.safetensors, or a directory")
    exporting.add_argument("--step", default="latest", help="a number, latest (default) or best")
    exporting.add_argument("--with-optimizer", action="store_true", help="a .pt that OpenCLIP resumes from")
    averaging = add("average", average_checkpoints, "write the mean of several checkpoints' weights")
    averaging.add_argument("out", metavar="OUT", type=Path, help="NAME.pt, NAME.safetensors, or a directory")
    which = averaging.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", help="as in 100,200,300")
    which.add_argument("--last", type=int, help="the newest K that are whole and not suspect")
    mirroring = add("mirror", mirror_run, "upload what --remote-sync has not; deletes nothing")
    mirroring.add_argument("url", metavar="URL", help="URL/NAME: --remote-sync joined with the run's name")
    mirroring.add_argument(
        "--take-over", action="store_true", help="the run has ended, although this machine cannot see that"
    )
    mirroring.add_argument("--protocol", choices=("s3", "fsspec"), help="default: s3 for s3://, else fsspec")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one of them; 1 if something is damaged or missing, 2 for a line that cannot be carried out."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.action(arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"clipyard checkpoints {arguments.command}: {error}\n")
        return 2
    except (DamagedCheckpoint, StorageError, RuntimeError) as error:
        sys.stderr.write(f"clipyard checkpoints {arguments.command}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
