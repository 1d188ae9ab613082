"""Several ranks write one checkpoint and read it, each its part."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.checkpoint import jobs
from tests.checkpoint.tiny_run import build_saver, tiny_parts, train_steps
from tests.distributed.launch import current_runtime, run_ranks
from training.checkpoint.checkpointer import Checkpointer, Share, read_step_checkpoint
from training.checkpoint.manifest import read_manifest


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_two_ranks_write_half_each_and_both_get_all_of_it_back(tmp_path: Path) -> None:
    outcomes = run_ranks(2, jobs.save_and_restore, str(tmp_path))
    assert [(outcome["saved"], outcome["restored"]) for outcome in outcomes] == [(True, True)] * 2
    step = tmp_path / "step_00000002"
    assert read_manifest(step).world_size == 2
    parts = [load_file(path) for path in sorted(step.glob("model-*-of-00002.safetensors"))]
    assert len(parts) == 2
    assert set(parts[0]).isdisjoint(parts[1])
    assert set(parts[0]) | set(parts[1]) == set(tiny_parts().model.state_dict())
    sizes = [outcome["buffer"] for outcome in outcomes]
    whole = sum(path.stat().st_size for path in step.glob("*-of-*"))
    assert max(sizes) < 0.7 * whole, "a rank has staged more than its share"


def test_three_ranks_continue_what_two_have_written_and_one_alone_too(tmp_path: Path) -> None:
    run_ranks(2, jobs.save_and_restore, str(tmp_path))
    assert run_ranks(3, jobs.restore_here, str(tmp_path)) == [("", 2)] * 3
    assert read_step_checkpoint(tmp_path / "step_00000002").train["world_size"] == 2
    assert run_ranks(1, jobs.restore_here, str(tmp_path)) == [("", 2)]


def _two_steps(root: Path) -> None:
    parts = tiny_parts()
    saver = build_saver(root, parts)
    for _ in range(2):
        train_steps(parts)
        saver.save_now_and_wait(0, "exit")


@pytest.mark.parametrize("kind", ["model", "optimizer", "data", "rng"])
def test_damage_that_one_rank_finds_sends_all_to_the_checkpoint_before(tmp_path: Path, kind: str) -> None:
    _two_steps(tmp_path)
    _flip(tmp_path / f"step_00000002/{kind}.safetensors")
    assert run_ranks(2, jobs.restore_here, str(tmp_path)) == [("", 1)] * 2


def test_damage_of_all_checkpoints_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    _two_steps(tmp_path)
    for step in (1, 2):
        _flip(tmp_path / f"step_0000000{step}/optimizer.safetensors")
    errors = {error for error, _ in run_ranks(2, jobs.restore_here, str(tmp_path))}
    assert len(errors) == 1
    assert "None of the 2 step checkpoints" in errors.pop()


def test_rank_0_alone_decides_what_is_loaded(tmp_path: Path) -> None:
    _two_steps(tmp_path)
    assert run_ranks(2, jobs.restore_blind, str(tmp_path)) == [("", 2)] * 2


def test_a_writer_that_lags_behind_drops_the_save_on_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, jobs.save_until_dropped, str(tmp_path)) == [[True, False, True]] * 2
    assert Checkpointer(tmp_path).steps() == [1]


def test_a_full_disk_on_one_rank_is_a_failed_save_of_the_job(tmp_path: Path) -> None:
    assert run_ranks(2, jobs.fail_to_save, str(tmp_path)) == [(False, 1), (False, 0)]
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_hold_other_weights_after_loading_are_named(tmp_path: Path) -> None:
    _two_steps(tmp_path)
    for error in run_ranks(2, jobs.restore_other_bits, str(tmp_path)):
        assert "the ranks [1] hold other bits than its files, first in 'visual.proj'" in error


def test_a_restore_takes_no_second_copy_of_the_optimizer_state(tmp_path: Path) -> None:
    ((state, growth),) = run_ranks(1, jobs.restore_a_larger_model, str(tmp_path))
    assert state > 30
    assert growth < 0.35 * state


def abandon_before_the_other_begins(root: str) -> bool:
    """Rank 0's disk is full at once; rank 1 begins when rank 0 has given up."""
    jobs.write_in_parts()
    runtime = current_runtime()
    real = Checkpointer.write_share

    def write(self: Checkpointer, staging: Path, share: Share, *, writer: int) -> None:
        if writer == 0:
            raise OSError(28, "No space left on device")
        deadline = time.monotonic() + 20
        while staging.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        real(self, staging, share, writer=writer)

    Checkpointer.write_share = write  # type: ignore[method-assign]
    parts = tiny_parts(runtime=runtime)
    return build_saver(Path(root), parts, runtime=runtime).save_now_and_wait(0, "exit")


def test_a_writer_that_begins_late_leaves_no_trace_of_an_abandoned_save(tmp_path: Path) -> None:
    assert run_ranks(2, abandon_before_the_other_begins, str(tmp_path)) == [False, False]
    assert list(tmp_path.iterdir()) == []
