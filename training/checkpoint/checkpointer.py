"""Writes and finds step checkpoints: directories that exist whole or not at all.

    RUN/checkpoints/
        step_00000120/
            model.safetensors      weights, by OpenCLIP's parameter names
            optimizer.safetensors  PARAMETER//STATE, such as visual.proj//exp_avg
            rng.safetensors        RANK//cpu, RANK//cuda
            data.safetensors       where the data lanes stand
            train.json             counters, optimizer settings, the data stream's facts, config
            MANIFEST.json          size and sha256 of each of the above, written last
        TAGS.json                  which steps are good, suspect, best
        LATEST                     the newest step: a hint for people, never read here

    each writer: files into .tmp-STEP-... -> fsync -> receipt
    rank 0:      all receipts -> fence -> MANIFEST -> read back -> fence -> rename -> fsync -> retention

A large state is spread over several writers (``model-00000-of-00004.safetensors``), whole tensors each; with FSDP each
writes its rows of them. A crash at any moment leaves the checkpoints that were there. Nothing here is a collective:
this runs beside the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from training.checkpoint.exchange import put_in_place
from training.checkpoint.manifest import (
    TRAIN_NAME,
    DamagedCheckpoint,
    FileFacts,
    Manifest,
    fsync,
    read_train,
    verify,
    write_manifest,
)
from training.checkpoint.parts import parts_of
from training.checkpoint.pieces import WholeTensors
from training.checkpoint.retention import FEWEST, newest_sound, steps_to_delete
from training.checkpoint.tags import TAGS_NAME, Tags, parse_tags, resume_order
from training.checkpoint.tensor_file import Piece, map_tensors, write_tensors, write_text

logger = logging.getLogger(__name__)

LATEST_NAME = "LATEST"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_NAME = re.compile(r"\.tmp-.+-g(\d{8,})-[0-9a-f]{8}(\.\w+)?")
_ASIDE_NAME = re.compile(r"\.tmp-aside-(step_\d{8,})-g\d{8,}-[0-9a-f]{8}")
_RECEIPT_TIMEOUT_S = 1800.0
_HELD: Counter[Path] = Counter()
"""Checkpoints that are being read, by how many; of this process, whose mirror has a ``Checkpointer`` of its own."""
_HELD_LOCK = threading.Lock()
_POLL_S = 0.02


class StepCheckpoint(NamedTuple):
    """The content of a step checkpoint, all ranks together; tensors on the CPU."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    train: Mapping[str, Any]
    """JSON types only."""


class Share(NamedTuple):
    """What one rank writes of a checkpoint, by file name."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, str]
    pieces: Mapping[str, Mapping[str, Piece]] = {}
    """Also by file name: those of the tensors that are some rows of a larger one."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


class NotFinite(RuntimeError):
    """Weights that are not numbers any more: such a checkpoint is worth nothing and would push out those that are."""


class Checkpointer:
    """The step checkpoints of one run."""

    def __init__(
        self,
        root: str | Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        generation: int = 0,
        fence: Callable[[], None] | None = None,
        receipt_timeout_s: float = _RECEIPT_TIMEOUT_S,
    ) -> None:
        """
        Args:
            keep: newest checkpoints that stay; at least 2.
            keep_every: multiples of this step stay for good; 0 keeps none.
            generation: the start of the run, as its lease counts them; 0 without a lease.
            fence: raises if another start owns the run by now; asked before every change that others could see.
            receipt_timeout_s: how long the other writers of a checkpoint may take.
        """
        self.root = Path(root)
        self.keep = keep
        self.keep_every = keep_every
        self.generation = generation
        self._fence = fence
        self.fenced_by: Exception | None = None
        """Why this process must not change the run any more, once the fence has said so."""
        self._receipt_timeout_s = receipt_timeout_s
        self._verified: set[int] = set()
        self._damaged: set[int] = set()
        self._in_flight: set[Path] = set()
        self._coming_suspect: set[int] = set()
        self._unwritten_tags: Tags | None = None
        self._tags_lock = threading.RLock()

    def path(self, step: int) -> Path:
        """The directory of a step, whether it exists or not."""
        return self.root / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint directory, ascending, verified or not."""
        if not self.root.is_dir():
            return []
        matches = [_STEP_NAME.fullmatch(path.name) for path in self.root.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def candidates(self) -> list[Path]:
        """All checkpoints in the order in which a start tries them: newest first, suspect ones at the end."""
        return [self.path(step) for step in resume_order(self.steps(), self.tags())]

    def newest(self, *, check: Callable[[Path], object] = verify) -> Path | None:
        """The newest checkpoint that verifies, a suspect one only if no other does; None if the run has none at all.

        Args:
            check: raises DamagedCheckpoint.

        Raises:
            DamagedCheckpoint: there are checkpoints and none of them is whole. The run must not start over in silence.
        """
        damages = []
        for path in self.candidates():
            try:
                check(path)
                return path
            except DamagedCheckpoint as damage:
                logger.warning("Skipping a damaged checkpoint: %s.", damage)
                damages.append(str(damage))
        if damages:
            raise none_is_whole(self.root, damages)
        return None

    def save(self, step: int, checkpoint: StepCheckpoint) -> Path:
        """Writes a whole checkpoint from this process alone, and waits for it; returns its directory."""
        share = Share(
            {
                "model.safetensors": checkpoint.model,
                "optimizer.safetensors": checkpoint.optimizer,
                "rng.safetensors": checkpoint.rng,
                "data.safetensors": checkpoint.data,
            },
            {"train.json": train_json(checkpoint.train)},
        )
        staging = self.new_staging(step, token=new_token())
        try:
            self.write_share(staging, share, writer=0)
        except BaseException:
            self.abandon(staging)
            raise
        return self.commit(step, staging, writers=[0])

    def new_staging(self, step: int, *, token: str) -> Path:
        """Where the files of a checkpoint are written before it is one; the token is the same on all ranks."""
        return self._temporary(f"{step:08d}", token=token)

    def open_staging(self, staging: Path) -> None:
        """Creates it, on rank 0, before others know of it: one that is late must not bring back what was abandoned.

        Raises:
            OSError: no space, no permission.
        """
        self._in_flight.add(staging)
        staging.mkdir(parents=True, exist_ok=True)

    def write_share(self, staging: Path, share: Share, *, writer: int) -> None:
        """Writes one rank's files and their receipt; on failure removes them again, and says so in the receipt.

        Only rank 0 creates the directory; where another finds none, the attempt was given up.

        Raises:
            OSError: no space, no permission, a disk that fails. NotFinite: the weights are ruined.
        """
        self._in_flight.add(staging)
        try:
            _check_finite(share)
            if writer == 0:
                self.open_staging(staging)
            facts = {
                name: write_tensors(staging / name, tensors, share.pieces.get(name))
                for name, tensors in share.tensors.items()
            }
            facts |= {name: write_text(staging / name, text) for name, text in share.texts.items()}
            _write_receipt(staging, writer, {name: entry._asdict() for name, entry in facts.items()})
        except Exception as error:
            for name in (*share.tensors, *share.texts):
                with contextlib.suppress(OSError):
                    (staging / name).unlink()  # the receipt may need the space
            with contextlib.suppress(OSError):
                _write_receipt(staging, writer, f"{type(error).__name__}: {error}")
            raise
        finally:
            if writer != 0:
                self._in_flight.discard(staging)

    def commit(
        self, step: int, staging: Path, *, writers: Sequence[int], world_size: int = 1, shard_ranks: int = 1
    ) -> Path:
        """Makes a checkpoint of what all writers have written, then removes what is past retention. On rank 0.

        Args:
            world_size: ranks of the job.
            shard_ranks: those of them that hold one copy of the state together; with more than 1 it lies in pieces.

        Raises:
            OSError: the disk. DamagedCheckpoint: what was written reads back otherwise. RuntimeError: a writer failed,
                or did not finish in time. Exception: what the fence raises, another start owns the run.
        """
        final = self.path(step)
        try:
            files = self._collect_receipts(staging, writers)
            self.check_fence()
            facts = {"generation": self.generation, "world_size": world_size, "shard_ranks": shard_ranks}
            write_manifest(staging, files, step=step, **facts)
            self._check_read_back(staging)
            self.check_fence()
            replaced = self._rename(staging, final)
        except BaseException:
            self.abandon(staging)
            raise
        self._in_flight.discard(staging)
        fsync(self.root)
        self._verified.add(step)
        self._damaged.discard(step)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
            self.change_tags(lambda tags: tags.without([step]).with_suspect(self._coming_suspect & {step}))
        self._write_hint(final)
        self.remove_old()
        return final

    def abandon(self, staging: Path) -> None:
        """Removes what a failed attempt has written. Renamed first: a writer that is late finds nothing to write to."""
        self._in_flight.discard(staging)
        with contextlib.suppress(OSError):
            staging = staging.rename(self._temporary(f"trash-{staging.name.removeprefix(_TEMPORARY_PREFIX)}"))
        shutil.rmtree(staging, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory on the run's disk, for as long as the block lasts.

        Raises:
            OSError: no space, no permission.
        """
        directory = self._temporary("scratch")
        self._in_flight.add(directory)
        try:
            directory.mkdir(parents=True)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            self._in_flight.discard(directory)

    @contextlib.contextmanager
    def hold(self, step: int) -> Iterator[None]:
        """Within the block retention leaves the checkpoint of a step alone, whichever object of this process does it.

        For who reads it over a long time beside the training.
        """
        path = self.path(step).absolute()
        with _HELD_LOCK:
            _HELD[path] += 1
        try:
            yield
        finally:
            with _HELD_LOCK:
                _HELD[path] -= 1

    def check_fence(self) -> None:
        """Returns if this process still owns the run; otherwise raises what the fence raises, and remembers it.

        An OSError is none of its answers: the disk of the leases has failed.
        """
        if self._fence is None:
            return
        try:
            self._fence()
        except OSError:
            raise
        except Exception as error:
            self.fenced_by = error
            raise

    def remove_old(self) -> None:
        """Deletes what is past retention. What cannot be deleted now is tried again after the next checkpoint.

        Before the first deletion of a start, the newest that stay are read back: damaged ones push out nothing.
        """
        tags = self.tags()
        doomed = self._doomed(tags)
        if doomed and self._read_newest_back(tags):
            doomed = self._doomed(tags)
        deleted = [step for step in doomed if self._delete(self.path(step))]
        if tags.without(deleted) != tags:
            self.change_tags(lambda tags: tags.without(deleted))
        for trash in self.root.glob(f"{_TEMPORARY_PREFIX}trash-*"):
            shutil.rmtree(trash, ignore_errors=True)

    def clean_up(self) -> list[Path]:
        """Removes what earlier starts left half written or half deleted; returns it.

        When a run starts: once it owns the run, before a checkpoint is looked for, since one that was being replaced
        gets its name back; and before anything else is written, which needs the space. What a later generation is
        writing stays: then this process is the one that is too late.

        Raises:
            OSError: a checkpoint cannot get its name back.
        """
        for path in self.root.glob(f"{_TEMPORARY_PREFIX}aside-*"):
            if self._is_leftover(path):
                self._bring_back(path)
        leftovers = [path for path in self.root.glob(f"{_TEMPORARY_PREFIX}*") if self._is_leftover(path)]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        return leftovers

    def set_aside(self) -> list[Path]:
        """Renames all checkpoints so that a run can start from the beginning without them; nothing is deleted."""
        self.check_fence()
        renamed = []
        for step in self.steps():
            renamed.append(self.path(step).rename(damaged_name(self.path(step))))
        self.change_tags(lambda _: Tags())
        return renamed

    def tags(self) -> Tags:
        """What is known about the checkpoints. Tags that cannot be read count as none."""
        with self._tags_lock:
            if self._unwritten_tags is not None:
                return self._unwritten_tags
            try:
                return parse_tags((self.root / TAGS_NAME).read_text())
            except FileNotFoundError:
                return Tags()
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be read (%s): no checkpoint counts as tagged.", self.root / TAGS_NAME, error)
                return Tags()

    def change_tags(self, change: Callable[[Tags], Tags]) -> None:
        """Replaces the tags. If they cannot be written now, this process still knows them."""
        with self._tags_lock:
            tags = change(self.tags())
            try:
                self.check_fence()
                self._replace_text(TAGS_NAME, tags.to_json())
                self._unwritten_tags = None
            except OSError as error:
                logger.warning("%s cannot be written (%s): kept in memory.", self.root / TAGS_NAME, error)
                self._unwritten_tags = tags

    def tag_suspect(self, from_step: int, *, coming: Collection[int] = ()) -> list[int]:
        """Marks the checkpoints from a step on, and those that are being written; returns their steps."""
        self._coming_suspect = {step for step in coming if step >= from_step}
        steps = sorted(self._coming_suspect.union(step for step in self.steps() if step >= from_step))
        self.change_tags(lambda tags: tags.with_suspect(steps))
        return steps

    def _collect_receipts(self, staging: Path, writers: Sequence[int]) -> dict[str, FileFacts]:
        """What all writers have written; waits for them."""
        deadline = time.monotonic() + self._receipt_timeout_s
        files: dict[str, FileFacts] = {}
        for writer in writers:
            while (receipt := _read_receipt(staging, writer)) is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"rank {writer} has not written its part of {staging.name} after {self._receipt_timeout_s:.0f} "
                        "s: its disk is too slow, or it does not see the same directory (--logs must be shared)"
                    )
                time.sleep(_POLL_S)
            if isinstance(receipt, str):
                raise RuntimeError(f"rank {writer} could not write its part: {receipt}")
            files |= {name: FileFacts(**entry) for name, entry in receipt.items()}
        for writer in writers:
            _receipt_path(staging, writer).unlink()
        return files

    def _check_read_back(self, staging: Path) -> Manifest:
        """From the disk, where the system lets go of what it has cached."""
        try:
            return verify_tensors(staging)
        except DamagedCheckpoint as damage:
            raise DamagedCheckpoint(f"what was just written reads back otherwise: {damage}") from None

    def _rename(self, staging: Path, final: Path) -> Path | None:
        """Returns where the one of that step is now that was there before.

        A run that went on from an earlier checkpoint comes to the same step anew, perhaps with other settings.
        """
        if not final.exists():
            staging.rename(final)
            return None
        logger.warning("Replacing %s, which an earlier start of the run has written.", final)
        return put_in_place(staging, final, aside=self._temporary(f"aside-{final.name}"))

    def _bring_back(self, aside: Path) -> None:
        """A crash has hit the moment in which a checkpoint had to leave its place for a new one."""
        match = _ASIDE_NAME.fullmatch(aside.name)
        if match is None:
            return
        final = self.root / match[1]
        try:
            verify(final)
        except DamagedCheckpoint:
            if final.exists():
                final.rename(damaged_name(final))
            aside.rename(final)
            logger.warning("%s is back: a crash had hit while it was being replaced.", final)

    def _doomed(self, tags: Tags) -> list[int]:
        doomed = steps_to_delete(
            self.steps(),
            keep=self.keep,
            every=self.keep_every,
            tags=tags,
            verified=self._verified,
            damaged=self._damaged,
        )
        with _HELD_LOCK:
            return [step for step in doomed if _HELD[self.path(step).absolute()] == 0]

    def _read_newest_back(self, tags: Tags) -> bool:
        """Reads back as many of the newest as a run must never have fewer of; returns whether one is damaged."""
        known = len(self._damaged)
        while unread := [
            step
            for step in newest_sound(self.steps(), count=FEWEST, tags=tags, damaged=self._damaged)
            if step not in self._verified
        ]:
            try:
                check_usable(self.path(unread[-1]))
                self._verified.add(unread[-1])
            except DamagedCheckpoint as damage:
                logger.warning("A damaged checkpoint does not count among those that are kept: %s.", damage)
                self._damaged.add(unread[-1])
        return len(self._damaged) > known

    def _delete(self, directory: Path) -> bool:
        """Renamed first: a crash half way through deleting must not leave something that looks like a checkpoint."""
        try:
            self.check_fence()
            trash = directory.rename(self._temporary(f"trash-{directory.name}"))
        except OSError as error:
            logger.warning("%s cannot be deleted (%s).", directory, error)
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _is_leftover(self, path: Path) -> bool:
        if path in self._in_flight:
            return False
        match = _TEMPORARY_NAME.fullmatch(path.name)
        return match is None or int(match[1]) <= self.generation

    def _temporary(self, label: str, *, token: str | None = None) -> Path:
        return self.root / temporary_name(label, generation=self.generation, token=token or new_token())

    def _write_hint(self, final: Path) -> None:
        with contextlib.suppress(OSError):
            self._replace_text(LATEST_NAME, final.name + "\n")

    def _replace_text(self, name: str, text: str) -> None:
        staging = self._temporary(name)
        try:
            write_text(staging, text)
            staging.replace(self.root / name)
        finally:
            staging.unlink(missing_ok=True)


def read_step_checkpoint(directory: Path) -> StepCheckpoint:
    """Reads a step checkpoint to the CPU after verifying it. Tensors take memory as they are looked at.

    Raises:
        DamagedCheckpoint: a file is missing or changed.
    """
    manifest = verify(directory)
    return StepCheckpoint(
        **{kind: read_parts(directory, manifest, kind) for kind in ("model", "optimizer", "rng", "data")},
        train=read_train(directory),
    )


def read_parts(directory: Path, manifest: Manifest, kind: str) -> WholeTensors:
    """All tensors of one kind, however many files they lie in.

    Raises:
        DamagedCheckpoint: a file is not one of tensors, or rows are missing.
    """
    return WholeTensors([directory / name for name in parts_of(kind, list(manifest.files))])


def verify_tensors(directory: Path) -> Manifest:
    """Verifies a checkpoint, and that every tensor is there with all its rows, whatever each file says of itself.

    Raises:
        DamagedCheckpoint: it is not what was written, or what was written is not all of it.
    """
    manifest = verify(directory)
    check_tensors(directory, manifest)
    return manifest


def check_tensors(directory: Path, manifest: Manifest) -> None:
    """The part of ``verify_tensors`` that reads the headers only."""
    weights = read_parts(directory, manifest, "model")
    read_parts(directory, manifest, "optimizer")
    if TRAIN_NAME in manifest.files:
        missing = [name for name in read_train(directory).get("weights", ()) if name not in weights]
        if missing:
            raise DamagedCheckpoint(f"{directory} has no file with {missing[0]!r} ({len(missing)} weights are missing)")


def check_usable(directory: Path) -> None:
    """Verifies a checkpoint and looks at its weights.

    Raises:
        DamagedCheckpoint: it is not what was written, or what was written was ruined already.
    """
    manifest = verify_tensors(directory)
    for file in parts_of("model", list(manifest.files)):
        for name, tensor in map_tensors(directory / file).items():
            if not is_finite(tensor):
                raise DamagedCheckpoint(f"{directory} holds weights that are not finite ({name!r})")


def none_is_whole(root: Path, damages: Sequence[str]) -> DamagedCheckpoint:
    """The error of a run whose checkpoints are all unusable."""
    return DamagedCheckpoint(
        f"None of the {len(damages)} step checkpoints in {root} is whole ({damages[0]}): restore one, or pass --resume "
        "PATH, or --allow-restart-from-zero to put them aside and go on from the newest epoch_N.pt, or else start from "
        "the beginning."
    )


def train_json(train: Mapping[str, Any]) -> str:
    """The text of ``train.json``."""
    return json.dumps(train, indent=1) + "\n"


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; the largest magnitude tells, without a mask as large as the tensor."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = tensor.detach().aminmax()  # both NaN if one value is
    return bool(low.isfinite() & high.isfinite())


def temporary_name(label: str, *, generation: int, token: str) -> str:
    """A name that no reader takes for a checkpoint, and that tells the janitor which start is writing it."""
    return f"{_TEMPORARY_PREFIX}{label}-g{generation:08d}-{token}"


def damaged_name(path: Path) -> Path:
    """A name beside it that is free, and that no reader takes for a checkpoint."""
    name = path.with_name(f"damaged-{path.name}")
    return name.with_name(f"{name.name}-{new_token()}") if name.exists() else name


def new_token() -> str:
    """Eight characters that no other attempt has."""
    return uuid.uuid4().hex[:8]


def _check_finite(share: Share) -> None:
    for file, tensors in share.tensors.items():
        if file in parts_of("model", [file]):
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise NotFinite(f"the weights are not finite ({name!r}): they are not saved")


def _receipt_path(staging: Path, writer: int) -> Path:
    return staging / f".receipt-{writer:05d}.json"


def _write_receipt(staging: Path, writer: int, content: Mapping[str, Any] | str) -> None:
    """Renamed into place: whoever sees it sees all of it."""
    path = _receipt_path(staging, writer)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(path)


def _read_receipt(staging: Path, writer: int) -> Any:
    try:
        return json.loads(_receipt_path(staging, writer).read_text())
    except FileNotFoundError:
        return None
