"""The record of which samples every step consumed."""

from __future__ import annotations

import torch

from training.data.trace import RECORD, SampleTrace, read_trace, truncate_other_ranks


def samples(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([[slot, raw_index, 0] for slot, raw_index in pairs])


def write(directory, *, rank: int, first_step: int, steps: range) -> None:
    trace = SampleTrace(directory, rank=rank, first_step=first_step)
    for step in steps:
        trace.append(step, samples((step, 0), (step, rank)))
    trace.close()


def test_a_step_is_read_back_by_rank(tmp_path):
    write(tmp_path, rank=0, first_step=0, steps=range(3))
    write(tmp_path, rank=1, first_step=0, steps=range(3))
    found = read_trace(tmp_path, step=2)
    assert {rank: records.tolist() for rank, records in found.items()} == {
        0: [(2, 2, 0), (2, 2, 0)],
        1: [(2, 2, 0), (2, 2, 1)],
    }


def test_a_resumed_run_replaces_the_steps_that_it_lost(tmp_path):
    write(tmp_path, rank=0, first_step=0, steps=range(5))
    write(tmp_path, rank=0, first_step=3, steps=range(3, 4))
    assert read_trace(tmp_path)[0]["step"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_torn_record_at_the_end_is_dropped(tmp_path):
    write(tmp_path, rank=0, first_step=0, steps=range(2))
    path = tmp_path / "rank_00000.bin"
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_trace(tmp_path)[0]) == 3
    write(tmp_path, rank=0, first_step=2, steps=range(2, 3))
    assert read_trace(tmp_path)[0]["step"].tolist() == [0, 0, 1, 2, 2]
    assert path.stat().st_size == 5 * RECORD.itemsize


def test_ranks_that_are_no_more_lose_the_steps_that_are_taken_again(tmp_path):
    write(tmp_path, rank=3, first_step=0, steps=range(4))
    truncate_other_ranks(tmp_path, world_size=2, first_step=2)
    assert read_trace(tmp_path)[3]["step"].tolist() == [0, 0, 1, 1]
