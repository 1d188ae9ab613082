"""``clipyard checkpoints``: lists, verifies, exports, averages and mirrors the checkpoints of a run.

RUN is a run's directory, its ``checkpoints`` directory, or where it is mirrored (URL/NAME).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from training.checkpoint.average import average_weights
from training.checkpoint.checkpointer import Checkpointer, read_parts
from training.checkpoint.export import epoch_content
from training.checkpoint.manifest import (
    MANIFEST_NAME,
    DamagedCheckpoint,
    FileFacts,
    Manifest,
    check_content,
    check_size,
    describe,
    read_manifest,
    read_train,
)
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_fetch import CHECKPOINTS, RemoteRun, files_by_step, parse_place, step_prefix
from training.checkpoint.mirror_store import open_store
from training.checkpoint.parts import parts_of
from training.checkpoint.tags import Tags
from training.commands.checkpoint_output import write_torch, write_weights
from training.data.storage_errors import StorageError
from training.resilience.lease import find_owner

HEADER = ("step", "epoch", "samples", "size", "age", "format", "start", "tags", "state")
LEASES = "leases"


class Checkpoints(Protocol):
    """The checkpoints of a run, here or elsewhere."""

    name: str

    def steps(self) -> list[int]:
        """Ascending, whole or not."""

    def tags(self) -> Tags: ...

    def manifest(self, step: int) -> Manifest:
        """Raises DamagedCheckpoint if files are missing or have another size."""

    def describe(self, step: int, name: str) -> FileFacts:
        """Reads a file."""

    def train(self, step: int) -> dict[str, Any]: ...

    def age_s(self, step: int) -> float | None: ...

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        """A directory with these files of a checkpoint, verified, and its manifest."""


class LocalCheckpoints:
    """A ``checkpoints`` directory."""

    def __init__(self, root: Path) -> None:
        self._checkpointer = Checkpointer(root)
        self.name = root.resolve().parent.name

    def steps(self) -> list[int]:
        return self._checkpointer.steps()

    def tags(self) -> Tags:
        return self._checkpointer.tags()

    def manifest(self, step: int) -> Manifest:
        manifest = read_manifest(self._checkpointer.path(step))
        for name, facts in manifest.files.items():
            check_size(self._checkpointer.path(step) / name, facts)
        return manifest

    def describe(self, step: int, name: str) -> FileFacts:
        return describe(self._checkpointer.path(step) / name)

    def train(self, step: int) -> dict[str, Any]:
        return read_train(self._checkpointer.path(step))

    def age_s(self, step: int) -> float | None:
        return time.time() - (self._checkpointer.path(step) / MANIFEST_NAME).stat().st_mtime

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        directory = self._checkpointer.path(step)
        manifest = self.manifest(step)
        for name in names:
            check_content(directory / name, expected=manifest.files[name], found=describe(directory / name))
        return directory


class RemoteCheckpoints:
    """A mirrored run."""

    def __init__(self, url: str) -> None:
        self._remote = RemoteRun(open_store(parse_place(url).run))
        self.name = self._remote.store.url.rpartition("/")[2]

    def steps(self) -> list[int]:
        return sorted(files_by_step(self._remote.listing(f"{CHECKPOINTS}/")))

    def tags(self) -> Tags:
        return self._remote.tags()

    def manifest(self, step: int) -> Manifest:
        return self._remote.manifest(step)

    def describe(self, step: int, name: str) -> FileFacts:
        return self._remote.describe(step, name)

    def train(self, step: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self._remote.read(f"{step_prefix(step)}train.json"))
        return content

    def age_s(self, step: int) -> float | None:
        return None

    def fetch(self, step: int, names: Sequence[str], scratch: Path) -> Path:
        directory = scratch / f"step_{step:08d}"
        directory.mkdir()
        self._remote.fetch_files(step, self._remote.manifest(step), names, directory)
        return directory


def open_checkpoints(run: str) -> Checkpoints:
    """The checkpoints that RUN stands for.

    Raises:
        ValueError: there are none.
    """
    if "://" in run:
        found: Checkpoints = RemoteCheckpoints(run)
    else:
        path = Path(run)
        found = LocalCheckpoints(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if not found.steps():
        raise ValueError(f"no step checkpoints in {run!r}: pass --logs joined with --name, or URL/NAME of a mirror")
    return found


def find_damages(checkpoints: Checkpoints, step: int) -> list[str]:
    """What is wrong with a checkpoint, one line per file; reads every byte. Empty: nothing."""
    try:
        manifest = checkpoints.manifest(step)
    except DamagedCheckpoint as damage:
        return [str(damage)]
    damages = []
    for name, expected in manifest.files.items():
        try:
            found = checkpoints.describe(step, name)
        except DamagedCheckpoint as damage:
            damages.append(str(damage))
            continue
        if found != expected:
            damages.append(f"{name}: sha256 {found.sha256[:16]}..., written with {expected.sha256[:16]}...")
    return damages


def choose_step(checkpoints: Checkpoints, wanted: str) -> int:
    """The step that ``--step`` means: a number, ``best``, or ``latest``, which is whole and not suspect.

    Raises:
        ValueError: there is none.
    """
    steps, tags = checkpoints.steps(), checkpoints.tags()
    if wanted == "best":
        if tags.best is None or tags.best.step not in steps:
            raise ValueError("no checkpoint is tagged best: train with --keep-best METRIC, or pass --step N")
        return tags.best.step
    if wanted == "latest":
        return _newest(checkpoints, 1)[0]
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise ValueError(f"--step {wanted}: there are {steps}, latest, and best if one is tagged")
    return int(wanted)


def _newest(checkpoints: Checkpoints, count: int) -> list[int]:
    """The newest that are complete by size and not suspect, oldest first."""
    suspect = checkpoints.tags().suspect
    found: list[int] = []
    for step in reversed(checkpoints.steps()):
        if len(found) < count and step not in suspect and _sizes_match(checkpoints, step):
            found.insert(0, step)
    if len(found) < count:
        raise ValueError(f"{len(found)} checkpoints are complete and not suspect, {count} are asked for")
    return found


def _sizes_match(checkpoints: Checkpoints, step: int) -> bool:
    try:
        checkpoints.manifest(step)
    except DamagedCheckpoint as damage:
        sys.stderr.write(f"passing over step {step}: {damage}\n")
        return False
    return True


class Weights(NamedTuple):
    """What an export is made of."""

    directory: Path
    weights: dict[str, Tensor]
    train: dict[str, Any]


@contextmanager
def _open_weights(checkpoints: Checkpoints, step: int, *, with_optimizer: bool = False) -> Iterator[Weights]:
    """Reads a checkpoint; every file that is used is verified."""
    manifest = checkpoints.manifest(step)
    kinds = ["model"] + ["optimizer"] * with_optimizer
    names = [name for kind in kinds for name in parts_of(kind, list(manifest.files))] + ["train.json"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = checkpoints.fetch(step, names, Path(scratch))
        weights, train = read_parts(directory, manifest, "model"), read_train(directory)
        yield Weights(directory, {key: weights[key] for key in train.get("weights", sorted(weights))}, train)


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
        "1" if manifest.world_size == 0 else "2",
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
    with _open_weights(checkpoints, step, with_optimizer=arguments.with_optimizer) as found:
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
        steps = _newest(checkpoints, arguments.last)
    with _open_all(checkpoints, steps) as models:
        names = [f"step {step}" for step in steps]
        weights = average_weights([model.weights for model in models], names=names)
        write_weights(arguments.out, weights, models[-1].train, name=checkpoints.name)
    sys.stdout.write(f"mean of {', '.join(names)} of {checkpoints.name} -> {arguments.out}\n")
    return 0


@contextmanager
def _open_all(checkpoints: Checkpoints, steps: Sequence[int]) -> Iterator[list[Weights]]:
    with ExitStack() as stack:
        yield [stack.enter_context(_open_weights(checkpoints, step)) for step in steps]


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
