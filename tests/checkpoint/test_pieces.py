"""Tensors that lie in several files: put together exactly, or refused with what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.checkpoint.capture import Held, choose_own
from training.checkpoint.checkpointer import Checkpointer, Share, check_usable, read_parts
from training.checkpoint.manifest import DamagedCheckpoint, read_manifest
from training.checkpoint.pieces import WholeTensors, copy_rows, find_pieces, join_files
from training.checkpoint.rows import StateRows
from training.checkpoint.step_loading import bit_sum, blocks_of
from training.checkpoint.tensor_file import Entry, Piece, map_tensors, read_entries, write_tensors
from training.distributed.sharding import ShardGroup

WEIGHT = torch.arange(42.0).reshape(7, 3, 2)


def _write(path: Path, **rows: tuple[int, int]) -> Path:
    """A file with the rows [start, end) of WEIGHT under each name."""
    pieces = {name: Piece((7, 3, 2), start) for name, (start, _) in rows.items()}
    write_tensors(path, {name: WEIGHT[start:end] for name, (start, end) in rows.items()}, pieces)
    return path


def test_pieces_become_the_tensor_again_in_whatever_order_the_files_come(tmp_path: Path) -> None:
    paths = [_write(tmp_path / "c", w=(5, 7)), _write(tmp_path / "a", w=(0, 3)), _write(tmp_path / "b", w=(3, 5))]
    write_tensors(tmp_path / "d", {"whole": torch.ones(2)})
    tensors = WholeTensors([*paths, tmp_path / "d"])
    assert set(tensors) == {"w", "whole"}
    assert len(tensors) == 2
    assert torch.equal(tensors["w"], WEIGHT)
    assert torch.equal(tensors["whole"], torch.ones(2))


def test_files_are_joined_into_one_of_whole_tensors(tmp_path: Path) -> None:
    halves = [_write(tmp_path / "a", w=(0, 4), v=(0, 7)), _write(tmp_path / "b", w=(4, 7))]
    write_tensors(tmp_path / "c", {"half": torch.ones(3).bfloat16(), "count": torch.tensor(5)})
    facts = join_files([*halves, tmp_path / "c"], tmp_path / "joined")
    joined = map_tensors(tmp_path / "joined")
    assert facts.size == (tmp_path / "joined").stat().st_size
    assert all(torch.equal(joined[name], WEIGHT) for name in ("w", "v"))
    assert (joined["half"].dtype, joined["count"].item()) == (torch.bfloat16, 5)
    assert all(entry.is_whole for entry in read_entries(tmp_path / "joined"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 3), (4, 7)], "has no file with rows 3 to 3 of 'w', which has 7"),
        ([(2, 7)], "has no file with rows 0 to 1 of 'w'"),
        ([(0, 3), (3, 6)], "has no file with rows 6 to 6 of 'w', which has 7"),
        ([(0, 4), (3, 7)], "1 has rows of 'w' that another file has as well"),
        ([(0, 7), (0, 7)], "1 has rows of 'w' that another file has as well"),
        ([(0, 4), (4, 7), (4, 7)], "2 has rows of 'w' that another file has as well"),
    ],
)
def test_rows_that_are_missing_or_there_twice_are_damage(
    tmp_path: Path, rows: list[tuple[int, int]], message: str
) -> None:
    paths = [_write(tmp_path / str(number), w=span) for number, span in enumerate(rows)]
    with pytest.raises(DamagedCheckpoint, match=message):
        WholeTensors(paths)
    with pytest.raises(DamagedCheckpoint, match=message):
        join_files(paths, tmp_path / "joined")


def test_pieces_of_different_tensors_under_one_name_are_damage(tmp_path: Path) -> None:
    _write(tmp_path / "a", w=(0, 3))
    write_tensors(tmp_path / "b", {"w": WEIGHT[3:].half()}, {"w": Piece((7, 3, 2), 3)})
    write_tensors(tmp_path / "c", {"w": WEIGHT[3:]}, {"w": Piece((8, 3, 2), 3)})
    for other in ("b", "c"):
        with pytest.raises(
            DamagedCheckpoint, match=rf"{other} has rows of 'w' as .*, and .*a as torch.float32 \(7, 3,"
        ):
            WholeTensors([tmp_path / "a", tmp_path / other])


def test_a_number_that_two_files_have_is_there_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"scale": torch.tensor(1.0)})
    with pytest.raises(DamagedCheckpoint, match="b has rows of 'scale' that another file has as well"):
        find_pieces({tmp_path / name: read_entries(tmp_path / name) for name in ("a", "b")})


@pytest.mark.parametrize(("target", "source", "count"), [((0, 7), (2, 4), 2), ((2, 4), (0, 7), 2), ((0, 2), (2, 7), 0)])
def test_rows_are_copied_where_both_sides_have_them(
    target: tuple[int, int], source: tuple[int, int], count: int
) -> None:
    own = torch.full((target[1] - target[0], 3, 2), -1.0)
    copied = copy_rows(own, WEIGHT[source[0] : source[1]], target_row=target[0], source_row=source[0])
    expected = torch.full((7, 3, 2), -1.0)
    expected[slice(*source)] = WEIGHT[slice(*source)]
    assert copied == count
    assert torch.equal(own, expected[slice(*target)])


def _share(**rows: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    return {"model-00000-of-00002.safetensors": {name: WEIGHT[slice(*span)] for name, span in rows.items()}}


def test_a_checkpoint_that_lacks_rows_gets_no_name_though_every_file_is_as_written(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    staging = checkpointer.new_staging(1, token="0123abcd")
    pieces = {"model-00000-of-00002.safetensors": {"w": Piece((7, 3, 2), 0)}}
    checkpointer.write_share(staging, Share(_share(w=(0, 4)), {"train.json": "{}"}, pieces), writer=0)
    with pytest.raises(DamagedCheckpoint, match=r"reads back otherwise: .* has no file with rows 4 to 6 of 'w'"):
        checkpointer.commit(1, staging, writers=[0], world_size=2, shard_ranks=2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_lacks_a_weight_is_not_usable(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    staging = checkpointer.new_staging(1, token="0123abcd")
    text = '{"step": 1, "weights": ["v", "w"]}'
    checkpointer.write_share(staging, Share({"model.safetensors": {"v": WEIGHT}}, {"train.json": text}), writer=0)
    with pytest.raises(DamagedCheckpoint, match=r"has no file with 'w' \(1 weights are missing\)"):
        checkpointer.commit(1, staging, writers=[0])


def test_weights_that_are_not_finite_are_found_in_pieces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.checkpoint.checkpointer._check_finite", lambda share: None)
    checkpointer = Checkpointer(tmp_path)
    staging = checkpointer.new_staging(1, token="0123abcd")
    bad = torch.full((7,), torch.nan)
    files = {f"model-0000{n}-of-00002.safetensors": {"w": bad[4 * n :][:4]} for n in range(2)}
    pieces = {name: {"w": Piece((7,), 4 * n)} for n, name in enumerate(files)}
    checkpointer.write_share(staging, Share(files, {}, pieces), writer=0)
    path = checkpointer.commit(1, staging, writers=[0], shard_ranks=2)
    assert read_parts(path, read_manifest(path), "model")["w"].isnan().all()
    with pytest.raises(DamagedCheckpoint, match=r"weights that are not finite \('w'\)"):
        check_usable(path)


def _entries(*sizes: int, dtype: torch.dtype = torch.uint8) -> list[Entry]:
    entries, offset = [], 64
    for number, size in enumerate(sizes):
        entries.append(Entry(str(number), dtype, (size,), offset, (size,)))
        offset += entries[-1].nbytes
    return entries


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [((4, 4, 4), [2, 1]), ((20, 1, 1), [1, 2]), ((1, 20, 1), [1, 1, 1]), ((0, 0, 8, 0), [4]), ((), [])],
)
def test_small_tensors_travel_together_and_large_ones_alone(sizes: tuple[int, ...], blocks: list[int]) -> None:
    found = list(blocks_of(_entries(*sizes), nbytes=8))
    assert [len(block) for block in found] == blocks
    assert [entry for block in found for entry in block] == _entries(*sizes)


def test_a_tensor_at_an_odd_place_begins_a_block(tmp_path: Path) -> None:
    odd = [*_entries(3), Entry("x", torch.float32, (2,), 67, (2,))]
    assert [len(block) for block in blocks_of(odd)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_the_sum_of_bits_does_not_depend_on_how_a_tensor_is_cut(dtype: torch.dtype) -> None:
    tensor = (torch.randn(7, 3) * 9).to(dtype)
    parts = sum(bit_sum(rows) for rows in (tensor[:3], tensor[3:6], tensor[6:], tensor[7:]))
    assert torch.equal(bit_sum(tensor), torch.as_tensor(parts))
    flipped = tensor.clone()
    flipped[5] = ~flipped[5] if dtype is torch.bool else flipped[5] + 1
    assert bit_sum(flipped) != bit_sum(tensor)


def test_every_tensor_is_written_once_by_the_ranks_of_the_chosen_copies() -> None:
    """Two ranks to a copy, two of the copies write: whole ones by the first ranks, statistics by rank 0."""
    written: dict[str, int] = {}
    for place in range(2):
        for index in range(2):
            held = {f"w{n}": Held(torch.zeros(4, n + 1), Piece((8, n + 1), 4 * index)) for n in range(5)}
            held |= {"scale": Held(torch.tensor(1.0), None), "mean": Held(torch.ones(3), None, is_common=True)}
            held["short"] = Held(torch.zeros(1 - index, 2), Piece((1, 2), index))
            group = ShardGroup(index, 2, replica=3 * place, replicas=4)
            own = choose_own(held, group=group, place=place, count=2)
            assert "mean" not in own or (place, index) == (0, 0)
            for name in own:
                written[name] = written.get(name, 0) + 1
    assert written == {f"w{n}": 2 for n in range(5)} | {"scale": 1, "mean": 1, "short": 1}


def test_single_numbers_of_an_optimizer_are_kept_on_the_host() -> None:
    rows = StateRows(torch.nn.Linear(2, 2))
    rows.add("weight//step", torch.tensor(3.0), full_shape=())
    rows.add("weight//exp_avg", torch.ones(1, 2), full_shape=(2, 2), row=1)
    rows.add("weight//exp_avg", torch.zeros(1, 2), full_shape=(2, 2), row=0)
    assert rows.tensors["weight//step"] == 3
    assert torch.equal(rows.tensors["weight//exp_avg"], torch.tensor([[0.0, 0], [1, 1]]))
