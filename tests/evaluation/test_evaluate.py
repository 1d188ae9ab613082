"""Whole evaluations: OpenCLIP's own numbers on the same model and files, the schedule, and what is left behind."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip_train import train as openclip_train
from PIL import Image
from torch import Tensor, nn

from tests.evaluation.builders import (
    CLASS_NAMES,
    PREPROCESS,
    TEMPLATES,
    captions_of,
    draw_image,
    encoded,
    label_of,
    loading,
    tiny_clip,
    tokenizer,
    write_class_folders,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)
from tests.factories import write_tar
from training.config import DataConfig, EvaluationConfig
from training.evaluation.datasets import open_imagenet
from training.evaluation.evaluate import build_evaluators, due, evaluate
from training.evaluation.evaluators import Evaluator, LabelledSource, ValidationEvaluator, ZeroShotEvaluator
from training.evaluation.prompts import Prompts
from training.evaluation.samples import EvaluationSample

CPU = torch.device("cpu")
RETRIEVAL_KEYS = {
    f"{direction}_{name}"
    for direction in ("image_to_text", "text_to_image")
    for name in ("mean_rank", "median_rank", "R@1", "R@5", "R@10")
}


def build(config: EvaluationConfig, data: DataConfig) -> list[Evaluator]:
    return build_evaluators(
        config, data, preprocess=PREPROCESS, tokenizer=tokenizer(), rank=0, world_size=1, device=CPU
    )


def run(model: nn.Module, evaluators: list[Evaluator], **options: Any) -> dict[str, float]:
    return evaluate(model, evaluators, preprocess=PREPROCESS, device=CPU, **{"epoch": 2, "last": False, **options})


def openclip_image(image: Image.Image) -> Tensor:
    """OpenCLIP's own preprocessing, normalisation included."""
    size = PREPROCESS.size
    transform = open_clip.image_transform(size, is_train=False, mean=PREPROCESS.mean, std=PREPROCESS.std)
    return transform(image)


class OpenClipLoader:
    """Validation pairs as OpenCLIP's loader hands them out."""

    def __init__(self, images: list[Image.Image], captions: list[str], *, batch_size: int) -> None:
        self.images, self.captions, self.batch_size = images, captions, batch_size
        self.num_samples = len(images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        texts = tokenizer()(self.captions)
        images = torch.stack([openclip_image(image) for image in self.images])
        yield from zip(images.split(self.batch_size), texts.split(self.batch_size), strict=True)


@pytest.mark.parametrize(
    ("epoch", "frequency", "last", "expected"),
    [
        (4, 2, False, True),
        (3, 2, False, False),
        (3, 2, True, True),
        (0, 2, False, True),
        (3, 0, True, False),
        (7, 1, False, True),
    ],
)
def test_evaluations_are_due_every_nth_epoch_and_after_the_last(
    epoch: int, frequency: int, last: bool, expected: bool
) -> None:
    assert due(epoch, frequency, last=last) is expected


@pytest.mark.parametrize("batch_size", [4, 100])
def test_validation_equals_openclips_on_the_same_pairs(tmp_path: Path, batch_size: int) -> None:
    """Same loss with a partial last batch, same ranks, same keys as one line of OpenCLIP's results.jsonl."""
    samples = [(f"{n:02d}", {"png": encoded(n), "txt": captions_of(n)[-1].encode()}) for n in range(22)]
    path = write_tar(tmp_path / "0.tar", samples)
    model = tiny_clip()
    data = DataConfig(val_data=str(path), batch_size=batch_size, workers=0)
    ours = run(model, build(EvaluationConfig(), data))

    images, captions = [draw_image(n) for n in range(22)], [captions_of(n)[-1] for n in range(22)]
    pairs = OpenClipLoader(images, captions, batch_size=batch_size)
    arguments = Namespace(
        rank=0, local_rank=0, device="cpu", precision="fp32", val_frequency=1, epochs=9, zeroshot_frequency=0,
        distributed=False, horovod=False, save_logs=False, wandb=False,
    )  # fmt: skip
    theirs = openclip_train.evaluate(model, {"val": Namespace(dataloader=pairs)}, 2, arguments)
    assert ours.keys() == theirs.keys() == RETRIEVAL_KEYS | {"clip_val_loss", "epoch", "num_samples"}
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-5 if name == "clip_val_loss" else 1e-9), name
    assert 0.0 < ours["image_to_text_R@5"] < 1.0


def test_zero_shot_equals_openclips_on_the_same_images(tmp_path: Path) -> None:
    model = tiny_clip()
    directory = write_classification_set(tmp_path / "zoo")
    ours = run(model, build(EvaluationConfig(zeroshot_data=str(directory)), DataConfig(batch_size=5, workers=0)))

    templates = [template.replace("{c}", "{}") for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer(), CLASS_NAMES, templates)
    images = torch.stack([openclip_image(draw_image(n)) for n in range(23)])
    labels = torch.tensor([label_of(n) for n in range(23)])
    with torch.no_grad():
        best = (100.0 * model.encode_image(images, normalize=True) @ weights).topk(5, dim=1).indices
    hits = best == labels[:, None]
    assert ours.keys() == {"zoo-zeroshot-top1", "zoo-zeroshot-top5", "zoo-zeroshot-mean_per_class_recall"}
    assert ours["zoo-zeroshot-top1"] == pytest.approx(hits[:, 0].double().mean().item())
    assert ours["zoo-zeroshot-top5"] == pytest.approx(hits.any(dim=1).double().mean().item())
    recalls = [hits[labels == c, 0].double().mean() for c in labels.unique()]
    assert ours["zoo-zeroshot-mean_per_class_recall"] == pytest.approx(torch.stack(recalls).mean().item())
    assert 0.0 < ours["zoo-zeroshot-top5"] < 1.0


def test_retrieval_sets_are_reported_under_the_directory_s_name(tmp_path: Path) -> None:
    directory = write_retrieval_set(tmp_path / "flickr")
    model = tiny_clip()
    ours = run(model, build(EvaluationConfig(retrieval_data=str(directory)), DataConfig(batch_size=5, workers=0)))
    assert ours.keys() == {
        f"flickr-{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5, 10)
    }
    owners = torch.tensor([n for n in range(17) for _ in captions_of(n)])
    texts = tokenizer()([caption for n in range(17) for caption in captions_of(n)])
    images = torch.stack([openclip_image(Image.open(io.BytesIO(encoded(n, "WEBP"))).convert("RGB")) for n in range(17)])
    with torch.no_grad():
        scores = model.encode_text(texts, normalize=True) @ model.encode_image(images, normalize=True).T
    found_images = scores.topk(5, dim=1).indices == owners[:, None]  # [captions, 5]
    found_texts = owners[scores.T.topk(5, dim=1).indices] == torch.arange(17)[:, None]  # [images, 5]
    for kind, found in (("image", found_images), ("text", found_texts)):
        expected = found.any(dim=1).double().mean().item()
        assert ours[f"flickr-{kind}_retrieval_recall@5"] == pytest.approx(expected)
        assert 0.0 < expected < 1.0


def imagenet_evaluator(directory: Path) -> ZeroShotEvaluator:
    """ImageNet's evaluator over as few classes as a test can afford."""
    write_class_folders(directory, sorted(CLASS_NAMES), per_class=2)
    source = open_imagenet(str(directory), num_classes=len(CLASS_NAMES), rank=0)
    sets = [LabelledSource(f"{name}-zeroshot-val-", source, ("top1", "top5")) for name in ("imagenet", "imagenetv2")]
    return ZeroShotEvaluator(2, Prompts(tuple(sorted(CLASS_NAMES)), TEMPLATES), sets, loading())


def test_sets_with_the_same_classes_share_one_classifier(tmp_path: Path) -> None:
    model = tiny_clip()
    encoded_prompts: list[int] = []
    encode_text = model.encode_text
    model.encode_text = lambda texts, normalize: encoded_prompts.append(len(texts)) or encode_text(texts, normalize)
    metrics = run(model, [imagenet_evaluator(tmp_path)])
    prefixes = ("imagenet-zeroshot-val-", "imagenetv2-zeroshot-val-")
    assert metrics.keys() == {f"{prefix}{top}" for prefix in prefixes for top in ("top1", "top5")}
    assert sum(encoded_prompts) == len(CLASS_NAMES) * len(TEMPLATES)


def test_imagenet_flags_build_one_evaluator_with_a_thousand_classes(tmp_path: Path) -> None:
    numbers = [str(number) for number in range(1000)]
    write_class_folders(tmp_path / "val", [f"n{number:08d}" for number in range(1000)], suffix="JPEG")
    write_class_folders(tmp_path / "v2", numbers, suffix="jpeg")
    config = EvaluationConfig(imagenet_val=str(tmp_path / "val"), imagenet_v2=str(tmp_path / "v2"))
    (evaluator,) = build(config, DataConfig(workers=0))
    assert isinstance(evaluator, ZeroShotEvaluator)
    assert [item.prefix for item in evaluator.sets] == ["imagenet-zeroshot-val-", "imagenetv2-zeroshot-val-"]
    assert [item.source.num_samples for item in evaluator.sets] == [1000, 1000]
    assert (len(evaluator.prompts.class_names), len(evaluator.prompts.templates)) == (1000, 80)


def test_each_evaluation_keeps_its_own_frequency(tmp_path: Path) -> None:
    evaluation = EvaluationConfig(
        zeroshot_data=str(write_classification_set(tmp_path / "zoo", samples=7)), zeroshot_frequency=2, val_frequency=3
    )
    data = DataConfig(val_data=write_pairs(tmp_path / "pairs", samples=4), workers=0)
    evaluators, model = build(evaluation, data), tiny_clip()
    kinds = {}
    for epoch in range(1, 6):
        metrics = run(model, evaluators, epoch=epoch, last=epoch == 5)
        kinds[epoch] = {"zoo": "zoo-zeroshot-top1" in metrics, "val": "clip_val_loss" in metrics}
    nothing = {"zoo": False, "val": False}
    assert kinds == {
        1: nothing,
        2: {"zoo": True, "val": False},
        3: {"zoo": False, "val": True},
        4: {"zoo": True, "val": False},
        5: {"zoo": True, "val": True},
    }
    assert run(model, evaluators, epoch=1) == {}


def test_frequency_zero_does_not_even_open_the_data() -> None:
    config = EvaluationConfig(zeroshot_data="nowhere", imagenet_val="nowhere", zeroshot_frequency=0, val_frequency=0)
    assert build(config, DataConfig(val_data="nowhere.tar")) == []


@pytest.mark.parametrize(
    "config",
    [EvaluationConfig(imagenet_val="nowhere"), EvaluationConfig(imagenet_v2="nowhere"),
     EvaluationConfig(zeroshot_data="nowhere"), EvaluationConfig(retrieval_data="nowhere")],
)  # fmt: skip
def test_a_wrong_path_ends_the_run_when_evaluators_are_built(config: EvaluationConfig) -> None:
    with pytest.raises(ValueError, match="'nowhere' does not exist: correct --"):
        build(config, DataConfig())


def test_towers_run_in_eval_mode_and_inference_and_the_given_context_then_train_as_before(tmp_path: Path) -> None:
    model = tiny_clip().train()
    model.visual.ln_post.eval()  # a frozen part
    before = {name: module.training for name, module in model.named_modules()}
    seen: list[tuple[bool, bool, bool]] = []
    active: list[str] = []
    encode_image = model.encode_image

    def watched(images: Tensor, normalize: bool) -> Tensor:
        seen.append((model.visual.conv1.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        assert images.dtype == torch.bfloat16
        return encode_image(images.float(), normalize)

    model.encode_image = watched

    def autocast() -> AbstractContextManager[object]:
        active.append("made")
        return torch.autocast("cpu", dtype=torch.bfloat16)

    data = DataConfig(val_data=write_pairs(tmp_path, samples=6), workers=0)
    metrics = run(model, build(EvaluationConfig(), data), autocast=autocast, input_dtype=torch.bfloat16)
    assert seen
    assert set(seen) == {(False, True, True)}
    assert active
    assert {name: module.training for name, module in model.named_modules()} == before
    assert metrics["num_samples"] == 6


def test_flags_are_restored_when_an_evaluation_fails(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": encoded(1)[:120], "txt": b"caption"})])
    model = tiny_clip().train()
    with pytest.raises(ValueError, match="sample 'a': broken image"):
        run(model, build(EvaluationConfig(), DataConfig(val_data=f"{tmp_path}/0.tar", workers=0)))
    assert all(module.training for module in model.modules())


def test_a_diverged_model_is_not_rewarded(tmp_path: Path) -> None:
    model = tiny_clip()
    with torch.no_grad():
        model.visual.proj.fill_(float("nan"))
    evaluation = EvaluationConfig(zeroshot_data=str(write_classification_set(tmp_path / "zoo")))
    data = DataConfig(val_data=write_pairs(tmp_path / "pairs"), workers=0)
    metrics = run(model, build(evaluation, data))
    assert metrics["zoo-zeroshot-top5"] == metrics["image_to_text_R@10"] == metrics["text_to_image_R@10"] == 0.0


class Faulty:
    """A source that loses a sample, or deals one twice."""

    flag = "--val-data"

    def __init__(self, positions: list[int], *, num_samples: int | None) -> None:
        self.positions, self.num_samples = positions, num_samples

    def part(self, part: int, num_parts: int) -> Iterator[EvaluationSample]:
        for position in self.positions:
            yield EvaluationSample(position, "there", encoded(position), captions=("one",))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Faulty([0, 1], num_samples=3), "2 of 3 samples were seen"),
        (Faulty([0, 1, 1], num_samples=3), "a sample was evaluated twice"),
        (Faulty([], num_samples=None), "0 of None samples were seen"),
    ],
)
def test_a_set_that_is_not_seen_whole_gives_no_metrics(source: Faulty, message: str) -> None:
    evaluator = ValidationEvaluator(1, source, loading(), loss_batch_size=4, chunk_size=4)
    with pytest.raises(RuntimeError, match=message):
        run(tiny_clip(), [evaluator])
