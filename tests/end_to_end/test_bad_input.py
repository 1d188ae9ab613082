"""Every mistake in a run's description ends it before its first step: code 2, one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import Outcome, run_ranks_to_end
from tests.factories import jpeg_bytes, write_csv, write_shards, write_tar

Run = Callable[[Sequence[str]], Outcome]


def _flags(tmp_path: Path, model: str, *more: str) -> list[str]:
    common = "--precision fp32 --device cpu --epochs 1 --batch-size 4 --workers 0 --warmup 1 --name r"
    return [*common.split(), "--model", model, "--logs", str(tmp_path / "logs"), *more]


def _expect(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.text
    assert "Traceback" not in outcome.text
    for word in words:
        assert word in outcome.text


def test_an_unknown_model_names_its_neighbours(run_here: Run, tmp_path: Path) -> None:
    outcome = run_here(_flags(tmp_path, "ViT-B-23", "--dataset-type", "synthetic", "--train-num-samples", "8"))
    _expect(outcome, "ViT-B-23", "ViT-B-32", "--model")


def test_a_missing_shard_pattern_is_named(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    _expect(run_here(_flags(tmp_path, tiny_model, "--train-data", f"{tmp_path}/{{0..3}}.tar")), "0.tar", "--train-data")


def test_an_empty_shard_pattern_is_named(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    _expect(run_here(_flags(tmp_path, tiny_model, "--train-data", f"{tmp_path}/*.tar")), "No shard matches", "*.tar")


def test_shards_without_captions_are_an_error_with_counts(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    write_tar(tmp_path / "0.tar", [(str(i), {"jpg": jpeg_bytes()}) for i in range(40)])
    argv = _flags(tmp_path, tiny_model, "--train-data", str(tmp_path / "0.tar"), "--train-num-samples", "40")
    _expect(run_here(argv), "1000 samples in a row cannot be used", "'no_caption': 1000", "--text-key")


def test_a_command_that_fails_is_named_with_its_status(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--train-data", "pipe:cat /nowhere.tar", "--train-num-samples", "8")
    _expect(run_here(argv), "'cat /nowhere.tar' ended with status 1")


def test_a_wrong_csv_column_is_named(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    path = write_csv(tmp_path / "csv", rows=8)
    argv = _flags(tmp_path, tiny_model, "--train-data", str(path), "--csv-img-key", "image")
    _expect(run_here(argv), "no column 'image'", "'filepath', 'title'", "--csv-img-key")


def test_an_image_size_that_patches_do_not_divide_is_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--force-image-size", "40", "--dataset-type", "synthetic")
    _expect(run_here([*argv, "--train-num-samples", "8"]), "40", "16", "--force-image-size")


def test_too_few_samples_for_one_batch_are_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    pattern = write_shards(tmp_path / "s", shards=1, samples=3)
    _expect(run_here(_flags(tmp_path, tiny_model, "--train-data", pattern)), "3 samples", "--batch-size")


def test_an_unwritable_log_directory_is_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "logs").write_text("a file, not a directory")
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8")
    _expect(run_here(argv), "cannot be written", "--logs")


def test_an_existing_name_is_refused_without_resume(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8")
    assert run_here(argv).code == 0
    _expect(run_here(argv), "exists already", "--resume latest", "--name")


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_a_checkpoint_of_another_architecture_is_refused(
    run_here: Run, tmp_path: Path, tiny_model: str, flag: str
) -> None:
    torch.save({"epoch": 1, "state_dict": {"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}}, tmp_path / "other.pt")
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8")
    _expect(run_here([*argv, flag, str(tmp_path / "other.pt")]), "visual", "--model")


def test_a_resume_path_that_is_no_checkpoint_is_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8")
    _expect(run_here([*argv, "--resume", str(tmp_path / "nowhere")]), "is no checkpoint", "--resume")


def test_resuming_the_latest_of_no_run_directory_is_refused(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8", "--logs", "none")
    _expect(run_here([*argv, "--resume", "latest"]), "--resume latest", "--logs none")


def test_a_wrong_evaluation_set_is_refused_before_training(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--dataset-type", "synthetic", "--train-num-samples", "8")
    _expect(run_here([*argv, "--zeroshot-data", str(tmp_path)]), str(tmp_path), "--zeroshot-data")


def test_nothing_to_do_is_an_error(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    _expect(run_here(_flags(tmp_path, tiny_model)), "nothing to train on", "--train-data")


def test_a_mistyped_flag_names_its_neighbour(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    _expect(run_here(_flags(tmp_path, tiny_model, "--train-dta", "x")), "--train-data")


@pytest.mark.parametrize("mistake", ["model", "data", "name"])
def test_every_rank_ends_with_a_non_zero_code(tmp_path: Path, tiny_model: str, mistake: str) -> None:
    argv = _flags(tmp_path, tiny_model, "--train-data", write_shards(tmp_path / "s", shards=2, samples=8))
    if mistake == "model":
        argv += ["--model", "ViT-B-23"]
    elif mistake == "data":
        argv += ["--train-data", f"{tmp_path}/none/*.tar"]
    else:
        (tmp_path / "logs/r").mkdir(parents=True)
        (tmp_path / "logs/r/params.txt").touch()
    outcomes = run_ranks_to_end(argv, world_size=2, timeout_s=60)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes[0].text + outcomes[1].text
