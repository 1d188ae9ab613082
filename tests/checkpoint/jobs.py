"""What the ranks of the tests in this folder do."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.memory import peak_gib, reset_peak, resident_gib
from tests.checkpoint.tiny_run import ALONE, build_saver, same, state_of, tiny_parts, train_steps
from tests.distributed.launch import current_runtime
from training.checkpoint import capture, checkpointer, run_state
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.parts import choose_writers
from training.checkpoint.run_state import find_resume_path, restore


def write_in_parts() -> None:
    """As a model of several GiB would be: one writer per 30 kB of the tiny model."""
    capture.choose_writers = partial(choose_writers, bytes_per_writer=30_000)  # type: ignore[assignment]


def save_and_restore(root: str) -> dict[str, object]:
    """Saves on all ranks, restores into a model with other weights."""
    write_in_parts()
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime)
    train_steps(parts, 2)
    saver = build_saver(Path(root), parts, runtime=runtime)
    staged = saver.save_now_and_wait(0, "exit")
    expected = state_of(parts)
    return {"saved": staged, "restored": _restore(root, runtime, expected), "buffer": len(saver._staging._buffer)}


def restore_here(root: str, *, fall_back: bool = True) -> tuple[str, int]:
    """(error, step) of restoring what is there."""
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime, seed=1)
    path = str(max(Path(root).glob("step_*")))
    try:
        restore(path, parts, runtime=runtime, steps_per_epoch=1, samples_per_step=4, fall_back=fall_back)
    except DamagedCheckpoint as damage:
        return str(damage), -1
    return "", parts.state.step


def restore_a_larger_model(root: str) -> tuple[float, float]:
    """(optimizer state, growth of resident memory beyond it at its peak) in MiB, of a restore into a new process."""
    device = torch.device("cpu")
    runtime = current_runtime()
    parts = tiny_parts(width=256, layers=6)
    train_steps(parts)
    size = sum(value.nbytes for state in parts.optimizer.state.values() for value in state.values()) / 2**20
    saver = build_saver(Path(root), parts)
    saver.save_now_and_wait(0, "exit")
    saver._staging = None  # type: ignore[assignment]
    for parameter in parts.model.parameters():
        parameter.grad = None
    path = f"{root}/step_00000001"
    restore(path, parts, runtime=runtime, steps_per_epoch=1, samples_per_step=4)  # all code is in memory from here on
    before = resident_gib()  # with an optimizer state, which the one that is read replaces
    reset_peak(device)
    restore(path, parts, runtime=runtime, steps_per_epoch=1, samples_per_step=4)
    return size, (peak_gib(device) - before) * 1024


def restore_blind(root: str) -> tuple[str, int]:
    """Rank 1 sees no directory at all."""
    if current_runtime().rank == 1:
        root = f"{root}/elsewhere"
        (Path(root) / "step_00000009").mkdir(parents=True)
    return restore_here(root)


def save_until_dropped(root: str) -> list[bool]:
    """Rank 1's disk stands still for the second save; every rank must come to the same decisions."""
    write_in_parts()
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime)
    saver = build_saver(Path(root), parts, runtime=runtime, checkpointer=Checkpointer(root, receipt_timeout_s=0.2))
    real, blocked = checkpointer.write_tensors, [runtime.rank == 1]

    def write(*arguments: object) -> object:
        if blocked[0]:
            time.sleep(1.0)
        return real(*arguments)  # type: ignore[arg-type]

    checkpointer.write_tensors = write  # type: ignore[assignment]
    decisions = [saver.save_step(epoch=0)]
    train_steps(parts)
    time.sleep(0.5)  # rank 0 has given up by now, rank 1 is still writing
    decisions.append(saver.save_step(epoch=0))
    blocked[0] = False
    decisions.append(saver.save_now_and_wait(0, "exit"))
    return decisions


def fail_to_save(root: str) -> tuple[bool, int]:
    """Rank 1's disk is full."""
    write_in_parts()
    runtime = current_runtime()
    parts = tiny_parts(runtime=runtime)
    saver = build_saver(Path(root), parts, runtime=runtime)
    if runtime.rank == 1:

        def write(*_: object) -> object:
            raise OSError(28, "No space left on device")

        checkpointer.write_tensors = write  # type: ignore[assignment]
    return saver.save_now_and_wait(0, "exit"), saver.failures


def restore_other_bits(root: str) -> str:
    """The network of rank 1 changes a bit."""
    runtime = current_runtime()
    if runtime.rank == 1:
        real = run_state.check_equal

        def flip(plan: object, tensors: dict[str, torch.Tensor], **rest: object) -> None:
            tensors["visual.proj"].view(-1)[3] += 1e-6
            real(plan, tensors, **rest)  # type: ignore[arg-type]

        run_state.check_equal = flip  # type: ignore[assignment]
    try:
        restore_here(root)
    except RuntimeError as error:
        return str(error)
    return ""


def die_when(root: str, phase: str) -> None:
    """Saves step 1, then dies by signal 9 within the save of step 2."""
    parts = tiny_parts()
    saver = build_saver(Path(root), parts)
    train_steps(parts)
    saver.save_now_and_wait(0, "exit")
    train_steps(parts)
    target, name = {
        "the first file": (checkpointer, "write_tensors"),
        "the receipts": (checkpointer, "_write_receipt"),
        "the manifest": (checkpointer, "write_manifest"),
        "reading back": (checkpointer, "verify"),
        "the rename": (Checkpointer, "_rename"),
        "the hint": (Checkpointer, "_write_hint"),
        "retention": (Checkpointer, "remove_old"),
    }[phase]
    setattr(target, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    saver.save_now_and_wait(0, "exit")


def train_for_ever(root: str) -> None:
    """Resumes, then saves every step until it is killed."""
    parts = tiny_parts()
    path = find_resume_path("latest", checkpoints=Path(root), verified=False)
    if path is not None:
        restore(path, parts, runtime=ALONE, steps_per_epoch=1, samples_per_step=4, fall_back=True)
    saver = build_saver(Path(root), parts)
    while True:
        train_steps(parts)
        saver.save_step(epoch=0)
        saver.poll()
        time.sleep(random.random() * 0.01)


def save_beyond_the_limit(root: str) -> str:
    """The file size limit is a full disk that needs no disk."""
    import resource

    parts = tiny_parts()
    saver = build_saver(Path(root), parts)
    saver.save_now_and_wait(0, "exit")
    train_steps(parts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert not saver.save_now_and_wait(0, "exit")
    fault = saver._last_fault
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    train_steps(parts)
    assert saver.save_now_and_wait(0, "exit")
    return fault


def _restore(root: str, runtime: object, expected: dict[str, torch.Tensor]) -> bool:
    parts = tiny_parts(runtime=runtime, seed=1)  # type: ignore[arg-type]
    path = str(max(Path(root).glob("step_*")))
    restore(path, parts, runtime=runtime, steps_per_epoch=1, samples_per_step=4)  # type: ignore[arg-type]
    return same(state_of(parts), expected)
