"""Checkpoints of a model whose rows are spread over ranks, and what becomes of them on other numbers of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.checkpoint import sharded_jobs as jobs
from tests.checkpoint.tiny_run import same, state_of, tiny_parts, train_steps
from tests.distributed.launch import run_ranks
from training.checkpoint.checkpointer import Checkpointer, check_usable, read_step_checkpoint
from training.checkpoint.manifest import DamagedCheckpoint, read_manifest, write_manifest
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_fetch import RemoteRun, fetch_newest
from training.checkpoint.mirror_store import open_store
from training.checkpoint.pieces import find_pieces
from training.checkpoint.tensor_file import read_entries
from training.commands.checkpoints import main as checkpoints_command


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 of a run on four ranks that share one copy; to be read only."""
    root = tmp_path_factory.mktemp("four")
    for _ in range(2):
        run_ranks(4, jobs.resume_train_save, str(root), 0)
    return root


def _expected(steps: int) -> dict[str, torch.Tensor]:
    parts = tiny_parts()
    train_steps(parts, steps)
    return state_of(parts)


def test_a_run_goes_from_world_to_world_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    """2 -> 4 -> alone -> 2 with DDP -> 3 -> 2 copies on 2 ranks each; no bit of weights and moments is lost."""
    saved = state_of(tiny_parts())
    for step, (world_size, shard_ranks) in enumerate([(2, 0), (4, 0), (1, None), (2, None), (3, 0), (4, 2)]):
        links = run_ranks(world_size, jobs.resume_train_save, str(tmp_path), shard_ranks)
        assert all(same(link.restored, saved) for link in links), (step, world_size)
        assert all(same(link.trained, links[0].trained) for link in links)
        saved = links[0].trained
        check_usable(Checkpointer(tmp_path).path(step + 1))
    for name, tensor in _expected(6).items():  # an update of 11 rows is not rounded as one of 32
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-7)


def test_each_rank_writes_its_own_rows_and_none_a_whole_tensor(saved_by_four: Path) -> None:
    step = saved_by_four / "step_00000002"
    manifest = read_manifest(step)
    assert (manifest.world_size, manifest.shard_ranks) == (4, 4)
    assert json.loads((step / "MANIFEST.json").read_text())["format"] == 3
    files = sorted(step.glob("model-*-of-00004.safetensors"))
    with safe_open(files[1], "pt") as file:  # the library reads it like any other
        rows = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
        assert rows["token_embedding.weight"] == (16, 32)
        assert "logit_scale" not in rows
        assert json.loads(file.metadata()["pieces"])["token_embedding.weight"] == [[64, 32], 16]
    sizes = [path.stat().st_size for path in sorted(step.glob("optimizer-*"))]
    assert len(sizes) == 4
    assert max(sizes) < 0.35 * sum(sizes)


def test_ranks_without_rows_of_a_tensor_write_none_of_it(saved_by_four: Path) -> None:
    """Five positions for four ranks: 2, 2, 1 and none."""
    counts = []
    for file in sorted((saved_by_four / "step_00000001").glob("model-*")):
        with safe_open(file, "pt") as tensors:
            name = "visual.positional_embedding"
            counts.append(tensors.get_slice(name).get_shape()[0] if name in tensors.keys() else 0)  # noqa: SIM118
    assert counts == [2, 2, 1, 0]


def test_copies_share_the_writing_between_them(tmp_path: Path) -> None:
    """As a large model would be: both copies of a 2 x 2 run write, each half of its rows."""
    links = run_ranks(4, jobs.resume_train_save_in_parts, str(tmp_path), 2)
    both = Checkpointer(tmp_path).path(1)
    files = {file: read_entries(file) for file in sorted(both.glob("optimizer-*-of-00004.safetensors"))}
    sizes = [sum(entry.nbytes for entry in entries) for entries in files.values()]
    assert len(sizes) == 4
    assert max(sizes) < 0.3 * sum(sizes)
    assert len(find_pieces(files)["visual.proj//exp_avg"]) == 2
    assert same(run_ranks(1, jobs.restore_path, str(both), None)[0], links[0].trained)


def test_what_reads_a_checkpoint_as_a_whole_gets_whole_tensors(saved_by_four: Path) -> None:
    read, expected = read_step_checkpoint(saved_by_four / "step_00000002"), _expected(2)
    assert same({**read.model, **read.optimizer}, expected)
    assert list(read.train["weights"]) == list(tiny_parts().model.state_dict())


@pytest.mark.parametrize("shard_ranks", [0, 1])
def test_a_rewind_brings_every_rank_its_rows(tmp_path: Path, shard_ranks: int) -> None:
    for step, state, stands_at in run_ranks(2, jobs.rewind, str(tmp_path), shard_ranks):
        assert (step, stands_at) == (1, 3)
        assert same(state, _expected(1))


@pytest.mark.parametrize("shard_ranks", [None, 0])
def test_a_run_that_only_evaluates_gets_the_weights(saved_by_four: Path, shard_ranks: int | None) -> None:
    path = str(saved_by_four / "step_00000002")
    weights = {name: tensor for name, tensor in _expected(2).items() if "//" not in name}
    for epoch, state in run_ranks(2, jobs.restore_weights_only, path, shard_ranks):
        assert epoch == 1
        assert same(state, weights)


def test_epoch_files_are_those_of_a_run_without_sharding(tmp_path: Path) -> None:
    run_ranks(3, jobs.save_epoch, str(tmp_path / "sharded"), 0, True)
    run_ranks(1, jobs.save_epoch, str(tmp_path / "whole"), None, True)
    for name in ("epoch_1.pt", "epoch_latest.pt"):
        sharded, whole = (torch.load(tmp_path / run / name, weights_only=True) for run in ("sharded", "whole"))
        assert list(sharded["state_dict"]) == list(whole["state_dict"])
        assert same(sharded["state_dict"], whole["state_dict"])
        assert sharded["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
        for number, values in whole["optimizer"]["state"].items():
            assert same(sharded["optimizer"]["state"][number], values)
    assert not list((tmp_path / "sharded").glob(".tmp*")), "the whole tensors were left behind"


def test_without_epoch_files_there_are_step_checkpoints_only(tmp_path: Path) -> None:
    run_ranks(2, jobs.save_epoch, str(tmp_path), 0, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000001"]


@pytest.mark.parametrize(("world_size", "shard_ranks"), [(3, 0), (4, 2), (2, None)])
def test_an_epoch_file_with_its_optimizer_goes_on_with_sharding(
    tmp_path: Path, world_size: int, shard_ranks: int | None
) -> None:
    run_ranks(1, jobs.save_epoch, str(tmp_path), None, True)
    for state in run_ranks(world_size, jobs.restore_path, str(tmp_path / "epoch_1.pt"), shard_ranks):
        assert same(state, _expected(1))


def test_rows_that_no_writer_has_written_make_no_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(2, jobs.lose_rows, str(tmp_path)) == [False, False]
    assert not Checkpointer(tmp_path).steps()


def test_a_bit_that_flips_in_the_rows_of_one_rank_is_seen_by_all(saved_by_four: Path) -> None:
    for error in run_ranks(2, jobs.restore_a_flipped_bit, str(saved_by_four / "step_00000002"), 0):
        assert "the ranks [0, 1] (each 2 in a row share a copy) hold other bits than its files" in error
        assert "first in 'visual.proj//exp_avg'" in error


def test_of_several_copies_the_one_with_other_bits_is_named(saved_by_four: Path) -> None:
    for error in run_ranks(4, jobs.restore_a_flipped_bit, str(saved_by_four / "step_00000002"), 2):
        assert "the ranks [0, 1] (each 2 in a row share a copy) hold other bits" in error


def _copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def _spoil(checkpoints: Path, *, step: int, how: str) -> None:
    directory = checkpoints / f"step_{step:08d}"
    second = directory / "optimizer-00001-of-00004.safetensors"
    if how == "a flipped bit":
        data = bytearray(second.read_bytes())
        data[-5] ^= 1
        second.write_bytes(data)
        return
    if how == "a missing file":
        second.unlink()
        return
    manifest = read_manifest(directory)
    files = dict(manifest.files)
    if how == "a file that the manifest forgot":
        del files[second.name]
    else:  # the rows of the first, once more, by a writer that was wrong and says so consistently
        shutil.copyfile(directory / "optimizer-00000-of-00004.safetensors", second)
        files[second.name] = files["optimizer-00000-of-00004.safetensors"]
    facts = {"world_size": manifest.world_size, "shard_ranks": manifest.shard_ranks}
    write_manifest(directory, files, step=step, **facts)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a flipped bit", "optimizer-00001-of-00004.safetensors was written as"),
        ("a missing file", "optimizer-00001-of-00004.safetensors is missing"),
        ("a file that the manifest forgot", "has no file with rows .* of '.*//exp_avg"),
        ("the rows of another rank", "has rows of '.*' that another file has as well"),
    ],
)
def test_damage_to_pieces_sends_all_ranks_to_the_checkpoint_before(
    saved_by_four: Path, tmp_path: Path, how: str, message: str
) -> None:
    checkpoints = _copy(saved_by_four, tmp_path)
    _spoil(checkpoints, step=2, how=how)
    with pytest.raises(DamagedCheckpoint, match=message):
        check_usable(Checkpointer(checkpoints).path(2))
    assert Checkpointer(checkpoints).newest(check=check_usable) == Checkpointer(checkpoints).path(1)
    if how in ("a flipped bit", "the rows of another rank"):
        outcomes = run_ranks(2, jobs.restore_newest_whole, str(checkpoints), 0)
        assert all(same(state, _expected(1)) for state in outcomes)


def _clipyard(*words: object) -> int:
    return checkpoints_command([str(word) for word in words])


def test_the_commands_read_pieces_as_they_read_whole_tensors(
    saved_by_four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(saved_by_four, tmp_path).parent
    assert [_clipyard(command, run) for command in ("list", "verify")] == [0, 0]
    assert capsys.readouterr().out.count("whole") == 2
    assert _clipyard("export", run, tmp_path / "x.safetensors", "--step", 2) == 0
    weights = {name: tensor for name, tensor in _expected(2).items() if "//" not in name}
    assert same(load_file(tmp_path / "x.safetensors"), weights)
    assert _clipyard("export", run, tmp_path / "x.pt", "--step", 1, "--with-optimizer") == 0
    assert all(same(state, _expected(1)) for state in run_ranks(2, jobs.restore_path, str(tmp_path / "x.pt"), 0))
    assert _clipyard("average", run, tmp_path / "soup.safetensors", "--last", 2) == 0
    mean = (_expected(1)["visual.proj"].double() + _expected(2)["visual.proj"].double()) / 2
    assert torch.equal(load_file(tmp_path / "soup.safetensors")["visual.proj"], mean.float())
    _spoil(run / "checkpoints", step=2, how="a flipped bit")
    assert _clipyard("verify", run) == 1


def test_a_mirrored_run_comes_back_with_all_its_pieces(saved_by_four: Path, tmp_path: Path) -> None:
    run = _copy(saved_by_four, tmp_path).parent
    store = open_store(f"memory://{tmp_path.name}/run", protocol="fsspec")
    assert Mirror(run, store).upload_once(final=True)
    fetched = fetch_newest(RemoteRun(store), tmp_path / "fetched")
    assert fetched is not None
    check_usable(fetched)
    assert len(list(fetched.glob("optimizer-*-of-00004.safetensors"))) == 4
    weights = {name: tensor for name, tensor in _expected(2).items() if "//" not in name}
    assert same(dict(read_step_checkpoint(fetched).model), weights)


def test_an_epoch_file_of_another_model_is_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    weights = {**tiny_parts().model.state_dict(), "visual.proj": torch.zeros(32, 8)}
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "x.pt")
    for outcome in run_ranks(2, jobs.restore_path, str(tmp_path / "x.pt"), 0):
        assert "1 of 38 tensors differ (first: visual.proj, saved (32, 8), now (32, 16)); pass the --model" in outcome
    (tmp_path / "x.pt").write_bytes(b"")
    assert {outcome[:60] for outcome in run_ranks(2, jobs.restore_path, str(tmp_path / "x.pt"), 0)} == {
        f"ValueError: '{tmp_path}/x.pt' cannot be read as a checkpoint"[:60]
    }


def test_an_optimizer_without_a_value_per_weight_cannot_be_cut(tmp_path: Path) -> None:
    messages = run_ranks(2, jobs.capture_and_restore_row_statistics, str(tmp_path))
    for saving, loading in messages:
        assert (
            "the optimizer keeps 'visual.proj//rows' in the shape (16,) for 16 rows of a parameter of shape" in saving
        )
        assert "pass another --opt, or leave out --fsdp" in saving
        assert "The checkpoint has 'visual.proj//rows' in the shape (32,) for a parameter of shape (32, 16)" in loading
        assert "Resume without --fsdp" in loading
