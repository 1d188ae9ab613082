"""A whole run as users start it: data, evaluation, files, and what the files hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.conftest import Outcome, run_ranks_to_end
from tests.factories import write_csv, write_shards
from training.data.demo import make_demo_data
from training.data.demo_samples import DemoSpec

Run = Callable[[Sequence[str]], Outcome]

OPENCLIP_TAGS = {
    f"train/{name}"
    for name in (
        "data_time",
        "batch_time",
        "samples_per_second",
        "samples_per_second_per_gpu",
        "scale",
        "logit_scale",
        "lr",
        "contrastive_loss",
        "loss",
    )
}
OPENCLIP_RETRIEVAL = {
    f"{direction}_{metric}"
    for direction in ("image_to_text", "text_to_image")
    for metric in ("mean_rank", "median_rank", "R@1", "R@5", "R@10")
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(directory, DemoSpec(samples=64, shards=8))
    return directory


def _flags(demo: Path, logs: Path, model: str, *more: str) -> list[str]:
    flags = "--precision fp32 --device cpu --epochs 2 --batch-size 8 --workers 1 --warmup 2 --name r"
    return [
        *flags.split(),
        "--evaluate-at-start",
        *("--model", model, "--logs", str(logs), "--report-to", "tensorboard", "--log-every-n-steps", "2"),
        *("--train-data", f"{demo}/train/*.tar", "--val-data", f"{demo}/val/*.tar"),
        *("--zeroshot-data", f"{demo}/zeroshot", "--retrieval-data", f"{demo}/retrieval", "--zeroshot-frequency", "1"),
        *more,
    ]


def _results(logs: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logs / "r/checkpoints/results.jsonl").read_text().splitlines()]


def test_a_run_on_two_ranks_leaves_what_open_clips_does(demo: Path, tmp_path: Path, tiny_model: str) -> None:
    outcomes = run_ranks_to_end(_flags(demo, tmp_path, tiny_model, "--batch-size", "4"), world_size=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].text + outcomes[1].text
    root = tmp_path / "r"
    results = _results(tmp_path)
    assert [result["epoch"] for result in results] == [0, 1, 2]
    zero_shot = {f"zeroshot-zeroshot-{name}" for name in ("top1", "top5", "mean_per_class_recall")}
    assert {"clip_val_loss", "num_samples"} | OPENCLIP_RETRIEVAL | zero_shot < set(results[-1])
    tags = EventAccumulator(str(root / "tensorboard")).Reload().Tags()["scalars"]
    assert OPENCLIP_TAGS | {"val/clip_val_loss", "val/image_to_text_R@1"} < set(tags)
    assert {"epoch_1.pt", "epoch_2.pt", "results.jsonl", "step_00000016"} < {p.name for p in root.glob("checkpoints/*")}
    assert "world_size: 2" in (root / "params.txt").read_text()
    assert "Train Epoch: 1 [64/64 (100%)]" in (root / "out.log").read_text()
    epoch_file = torch.load(root / "checkpoints/epoch_2.pt", weights_only=True)
    assert {"epoch", "name", "state_dict", "optimizer"} < set(epoch_file)


def test_one_rank_and_two_ranks_train_the_same_model(tmp_path: Path, tiny_model: str) -> None:
    """Two ranks of 4 see other samples than one rank of 8, so they get the same ones: all of a CSV in one batch."""
    table = write_csv(tmp_path / "csv", rows=16)
    losses = []
    for world_size in (1, 2):
        logs = tmp_path / str(world_size)
        flags = f"--precision fp32 --device cpu --epochs 3 --workers 0 --warmup 1 --batch-size {16 // world_size}"
        argv = [*flags.split(), "--train-data", str(table), "--model", tiny_model, "--logs", str(logs), "--name", "r"]
        # The whole image: which pixels a sample shows depends on its place in the order, and that on the ranks.
        argv += ["--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)", "--log-every-n-steps", "1"]
        outcomes = run_ranks_to_end(argv, world_size=world_size)
        assert {outcome.code for outcome in outcomes} == {0}, outcomes[0].text
        lines = [json.loads(line) for line in (logs / "r/metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines])
    assert len(losses[0]) == 3
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


def test_without_training_data_weights_are_evaluated_once(
    run_here: Run, demo: Path, tmp_path: Path, tiny_model: str
) -> None:
    trained = run_here(_flags(demo, tmp_path / "train", tiny_model))
    assert trained.code == 0, trained.text
    argv = _flags(demo, tmp_path / "eval", tiny_model)
    start = argv.index("--train-data")
    del argv[start : start + 2]
    checkpoints = tmp_path / "train/r/checkpoints"
    for source in (["--pretrained", str(checkpoints / "epoch_2.pt")], ["--resume", str(checkpoints / "step_00000016")]):
        outcome = run_here([*argv, *source, "--name", source[0].strip("-")])
        assert outcome.code == 0, outcome.text
        lines = (tmp_path / "eval" / source[0].strip("-") / "checkpoints/results.jsonl").read_text().splitlines()
        expected = _results(tmp_path / "train")[-1]
        assert len(lines) == 1
        found = json.loads(lines[0])
        assert {k: v for k, v in found.items() if k != "epoch"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "epoch"}, rel=1e-5
        )


@pytest.mark.parametrize(
    "more",
    [
        ["--siglip"],
        ["--accum-freq", "2", "--grad-clip-norm", "1.0", "--grad-checkpointing"],
        ["--lock-image", "--lock-image-unlocked-groups", "1"],
        ["--lock-text"],
        ["--precision", "amp_bf16", "--opt", "timm/lion", "--lr", "1e-4"],
        ["--precision", "pure_bf16", "--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1"],
        ["--torchcompile", "--torchcompile-backend", "aot_eager", "--skip-scheduler"],
        ["--logs", "none"],
        ["--copy-codebase", "--log-local", "--debug", "--delete-previous-checkpoint", "--save-most-recent"],
    ],
    ids=lambda more: more[0].strip("-") + "-" + more[1].strip("-") if len(more) > 1 else more[0].strip("-"),
)
def test_flags_work_in_a_whole_run(run_here: Run, tmp_path: Path, tiny_model: str, more: list[str]) -> None:
    pattern = write_shards(tmp_path / "s", shards=2, samples=16)
    flags = "--precision fp32 --device cpu --epochs 2 --batch-size 4 --workers 0 --warmup 1 --name r"
    argv = [*flags.split(), "--model", tiny_model, "--logs", str(tmp_path / "logs"), "--train-data", pattern]
    outcome = run_here([*argv, *more])
    assert outcome.code == 0, outcome.text
    assert "Train Epoch: 1 [32/32 (100%)]" in outcome.text
    assert "Loss: nan" not in outcome.text
