"""What ranks do whose model is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.checkpoint.jobs import write_in_parts
from tests.checkpoint.tiny_run import build_saver, tiny_parts, train_steps, whole_state_of
from tests.distributed.launch import current_runtime
from training.checkpoint import run_state
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.epoch_loading import restore_weights
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.run_state import find_resume_path, restore
from training.distributed.sharding import local_parameters, placements


class Link(NamedTuple):
    """What a start of a run came to."""

    restored: dict[str, Tensor]
    """Weights and optimizer state as wholes after the resume."""
    trained: dict[str, Tensor]
    """The same one step later."""
    rows: dict[str, int]
    """Of this rank, by parameter."""


def resume_train_save(root: str, shard_ranks: int | None) -> Link:
    """One start of a run: resumes the newest checkpoint, makes a step and saves it."""
    runtime = current_runtime()
    path = find_resume_path("latest", checkpoints=Path(root), verified=False)
    parts = tiny_parts(runtime=runtime, seed=0 if path is None else 7, shard_ranks=shard_ranks)
    if path is not None:
        _restore(path, parts)
    restored = whole_state_of(parts)
    train_steps(parts)
    saver = build_saver(Path(root), parts, runtime=runtime)
    assert saver.save_now_and_wait(1, "exit")
    saver.finish()
    return Link(restored, whole_state_of(parts), {name: place.rows for name, place in placements(parts.model).items()})


def restore_path(path: str, shard_ranks: int | None) -> dict[str, Tensor] | str:
    """The state after a restore, or its error."""
    parts = tiny_parts(runtime=current_runtime(), seed=7, shard_ranks=shard_ranks)
    try:
        _restore(path, parts)
    except (DamagedCheckpoint, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return whole_state_of(parts)


def restore_newest_whole(root: str, shard_ranks: int) -> dict[str, Tensor]:
    """The state after a restore that passes over what is damaged."""
    parts = tiny_parts(runtime=current_runtime(), seed=7, shard_ranks=shard_ranks)
    path = str(max(Path(root).glob("step_*")))
    restore(path, parts, runtime=current_runtime(), steps_per_epoch=1, samples_per_step=4, fall_back=True)
    return whole_state_of(parts)


def restore_weights_only(path: str, shard_ranks: int | None) -> tuple[int, dict[str, Tensor]]:
    """As a run does that only evaluates."""
    parts = tiny_parts(runtime=current_runtime(), seed=7, shard_ranks=shard_ranks)
    epoch = restore_weights(path, parts.model, runtime=current_runtime())
    return epoch, whole_state_of(parts)


def rewind(root: str, shard_ranks: int) -> tuple[int, dict[str, Tensor], int]:
    """Saves steps 1 and 2, trains on, and goes back to before step 2."""
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime, shard_ranks=shard_ranks)
    saver = build_saver(Path(root), parts, runtime=runtime)
    for _ in range(2):
        train_steps(parts)
        saver.save_now_and_wait(0, "exit")
    train_steps(parts)
    step = saver.rewind(2)
    return step, whole_state_of(parts), parts.state.step


def restore_a_flipped_bit(path: str, shard_ranks: int) -> str:
    """The memory of rank 1 changes a bit of its rows after they were read."""
    runtime = current_runtime()
    real = run_state.check_equal

    def flip(plan: Any, tensors: dict[str, Tensor], **rest: Any) -> None:
        if runtime.rank == 1:
            tensors["visual.proj//exp_avg"].view(torch.int32).view(-1)[0] ^= 1
        real(plan, tensors, **rest)

    run_state.check_equal = flip  # type: ignore[assignment]
    outcome = restore_path(path, shard_ranks)
    assert isinstance(outcome, str)
    return outcome


def save_epoch(root: str, shard_ranks: int | None, epoch_files: bool) -> None:
    """The end of the first epoch of a run that keeps epoch_latest.pt as well."""
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime, shard_ranks=shard_ranks)
    train_steps(parts)
    saver = build_saver(Path(root), parts, runtime=runtime, epoch_files=epoch_files, save_most_recent=True)
    saver.save_epoch(1)
    saver.finish()


def lose_rows(root: str) -> bool:
    """Rank 1 forgets one of its tensors; what is left verifies file by file."""
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime, shard_ranks=0)
    train_steps(parts)
    if runtime.rank == 1:
        real = Checkpointer.write_share

        def write(self: Checkpointer, staging: Path, share: Any, *, writer: int) -> None:
            files = {name: dict(tensors) for name, tensors in share.tensors.items()}
            del next(iter(files.values()))["visual.proj"]
            pieces = {name: {key: share.pieces[name][key] for key in files[name]} for name in files}
            real(self, staging, share._replace(tensors=files, pieces=pieces), writer=writer)

        Checkpointer.write_share = write  # type: ignore[method-assign]
    return build_saver(Path(root), parts, runtime=runtime).save_now_and_wait(0, "exit")


def _restore(path: str, parts: Any) -> None:
    restore(path, parts, runtime=current_runtime(), steps_per_epoch=1, samples_per_step=4)


def resume_train_save_in_parts(root: str, shard_ranks: int) -> Link:
    """As a model of several GiB would be saved."""
    write_in_parts()
    return resume_train_save(root, shard_ranks)


def capture_and_restore_row_statistics(root: str) -> tuple[str, str]:
    """(error of a save, error of a restore) with an optimizer that keeps a value per row, as Adafactor does."""
    runtime = current_runtime()
    whole, parts = tiny_parts(runtime=runtime), tiny_parts(runtime=runtime, shard_ranks=0)
    messages = []
    for run, saves in ((parts, True), (whole, False)):
        train_steps(run)
        names = local_parameters(run.model)
        run.optimizer.state[names["visual.proj"]]["rows"] = torch.ones(len(names["visual.proj"]))
        saver = build_saver(Path(root), run, runtime=runtime)
        try:
            saver.save_now_and_wait(0, "exit")
        except ValueError as error:
            assert saves
            messages.append(str(error))
    outcome = restore_path(f"{root}/step_00000001", 0)
    assert isinstance(outcome, str)
    return messages[0], outcome
