"""What cannot work is refused before anything starts, with the flag, its value and the remedy."""

from __future__ import annotations

import ast
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from training.cli import parse
from training.config import Config, LoggingConfig
from training.flags import BY_FIELD
from training.validation import _RANGES, AUGMENTATION_KEYS, inert_settings, logs_disabled, report_targets, validate


def parse_line(line: str):
    return parse(["--train-data", "a.tar", *shlex.split(line)])


@pytest.mark.parametrize("field_name", _RANGES)
def test_every_number_has_a_range(field_name):
    option = BY_FIELD[field_name].option
    value = "-1" if BY_FIELD[field_name].kind == "integer" else "-0.5"
    with pytest.raises(ValueError, match=rf"{option} {value} must be (at least|more than) "):
        parse_line(f"{option} {value}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
        ("--lr 0", "--lr 0.0 must be more than 0"),
        ("--lr nan", "--lr nan must be more than 0"),
        ("--wd inf", "--wd inf must be finite"),
        ("--beta2 1", "--beta2 1.0 must be at least 0 and less than 1"),
        ("--force-patch-dropout 1", "--force-patch-dropout 1.0 must be at least 0 and less than 1"),
        ("--keep-checkpoints 1", "--keep-checkpoints 1 must be at least 2"),
        ("--accum-freq 0", "--accum-freq 0 must be at least 1"),
        ("--grad-clip-norm 0", "--grad-clip-norm 0.0 must be more than 0"),
        ("--lr-scheduler const-cooldown", "const-cooldown does not say how long to cool down: pass --epochs-cooldown"),
        (
            "--lr-scheduler const-cooldown --epochs 2 --epochs-cooldown 3",
            "--epochs-cooldown 3 is longer than --epochs 2",
        ),
        ("--lr-scheduler cosin", r"--lr-scheduler 'cosin' is not one of .*\(nearest: cosine\)"),
        ("--opt adam", r"--opt 'adam' is not adamw, stableadamw, nadamw or timm/NAME \(nearest: adamw\)"),
        ("--opt timm/", "--opt 'timm/' is not adamw"),
        (
            "--opt timm/lamb --wd-exclude x",
            "--opt timm/lamb groups parameters by timm's own rule: leave --wd-exclude out",
        ),
        ("--opt timm/lamb --lr 1 --beta1 0.9", "--opt timm/lamb needs both --beta1 and --beta2, or neither"),
        ("--fsdp --fsdp-shard-ranks 1", "--fsdp-shard-ranks 1 shares nothing out: leave --fsdp out"),
        ("--fsdp --precision bf16", "--precision bf16, which mixes types of weights within a block: use amp_bf16"),
        ("--fsdp --opt timm/lamb --lr 1", "--opt timm/lamb, which may need whole tensors .* use adamw"),
        ("--fsdp --opt timm/lion --lr 1 --opt-kwargs caution=True", "caution=True, which weighs whole tensors: leave"),
        (
            "--fp8 rowwise --precision amp",
            "--fp8 rowwise with --precision amp: .* everything else in bf16; use amp_bf16",
        ),
        ("--fp8 tensorwise --fsdp", "--fp8 tensorwise with --fsdp: not supported together"),
        (
            "--grad-reduce-dtype bf16 --precision pure_fp16",
            "with --precision pure_fp16: .* lose 3 of their 11 bits. Leave",
        ),
        ("--fsdp --fsdp-offload-cpu --device cpu", "the shards are in host memory already. Leave it out"),
        ("--fsdp --fsdp-offload-cpu --precision amp", "the loss scaler does not wait .* Use amp_bf16"),
        ("--train-data-upsampling-factors 1", "weighs random draws of shards: pass --dataset-resampled too"),
        ("--dataset-resampled --train-data-upsampling-factors 1::2", "has 2 factors for 1 sources in --train-data"),
        ("--dataset-resampled --train-data-upsampling-factors two", "two must be numbers of at least 0, not all 0"),
        ("--dataset-resampled --train-data-upsampling-factors 0", "0 must be numbers of at least 0, not all 0"),
        ("--dataset-type synthetic", "--dataset-type synthetic has no size of its own: pass --train-num-samples"),
        ("--resume ''", r"--resume '' is empty \(an unset shell variable\?\)"),
        ("--name ' '", "--name ' ' is empty"),
        ("--image-key ';'", "--image-key ';' is empty"),
        ("--csv-separator ''", "--csv-separator '' is empty"),
        ("--image-mean 0.1 0.2", "--image-mean has 2 values: give one, or one for each of the 3 channels"),
        ("--image-mean nan", "--image-mean nan must be finite numbers"),
        ("--image-std 0", "--image-std 0.0 divides pixels: every value must be more than 0"),
        ("--force-image-size 1 2 3", "--force-image-size 1 2 3 must be one positive size, or a height and a width"),
        ("--force-image-size 0", "--force-image-size 0 must be one positive size"),
        ("--report-to tensorbord", r"--report-to tensorbord reports nowhere \(nearest: tensorboard\)"),
        ("--report-to trackio,tensorboard", "is refused: trackio is not supported. Use tensorboard or wandb"),
        ("--train-data-manifest m.yaml", "and --train-data a.tar both say what to train on"),
        ("--json-text-key-probs 1", "--json-text-key-probs 1.0 weighs the fields of --json-text-key"),
        ("--json-text-key a --json-text-key-probs 1 1", "has more numbers than --json-text-key a has fields"),
        ("--json-text-key a --json-text-key-probs 0", "must be numbers of at least 0, not all 0"),
        ("--json-text-key 'a;a'", "--json-text-key a;a must name one or more different fields"),
        ("--max-bad-samples 1.5", "--max-bad-samples 1.5 must be at least 0 and at most 1"),
        ("--loss-dist-impl ring", "--loss-dist-impl 'ring' is not one of bidir, shift, reduce, gather"),
    ],
)
def test_what_cannot_work_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse_line(line)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("scal=1", r"--aug-cfg scal=1 is not an augmentation key \(nearest: scale\): it has scale, ratio"),
        ("interpolation=bicubic", r"is not an augmentation key \(use --image-interpolation\)"),
        ("scale=0.4", r"--aug-cfg scale=0\.4 must be two shares of the image's area.*quote it"),
        ("scale=(0.9,0.4)", r"scale=\(0\.9, 0\.4\) must be two shares"),
        ("ratio=(0,1)", r"ratio=\(0, 1\) must be two aspect ratios"),
        ("ratio=(a,1)", r"ratio='\(a,1\)' must be two aspect ratios"),
        ("color_jitter=(0.1,0.2)", r"color_jitter=\(0\.1, 0\.2\) must be a strength, or 3 or 4"),
        ("color_jitter=-1", "color_jitter=-1 must be a strength"),
        ("re_prob=1.5", r"re_prob=1\.5 must be a probability"),
        ("gray_scale_prob=often", "gray_scale_prob='often' must be a probability"),
        ("re_count=0", "re_count=0 must be a whole number of at least 1"),
        ("use_timm=1", "use_timm=1 must be True or False"),
        ("color_jitter_prob=0.8", r"color_jitter_prob=0\.8 has no color_jitter to apply"),
    ],
)
def test_an_augmentation_that_cannot_be_is_refused(item, message):
    with pytest.raises(ValueError, match=message):
        parse_line(f"--aug-cfg '{item}'")


@pytest.mark.parametrize(
    "items",
    [
        "scale=(0.8,1.2) ratio=[1,1] color_jitter=0.4 re_prob=0 re_count=2 use_timm=False",
        "color_jitter=(0.3,0.3,0.3) color_jitter_prob=1 gray_scale_prob=0.2 openclip_keys=True",
        "color_jitter=None re_prob=None",
        "color_jitter_prob=0.8 use_timm=True openclip_keys=True",
    ],
)
def test_an_augmentation_that_openclip_takes_is_taken(items):
    assert len(parse_line(f"--aug-cfg {items}").config.image.aug_cfg) == len(items.split())


def test_augmentation_keys_are_those_of_the_installed_openclip():
    # Read, not imported: the import takes ten seconds.
    source = Path(find_spec("open_clip").origin).with_name("transform.py").read_text()
    (their_class,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "AugmentationCfg"
    )
    theirs = {node.target.id for node in their_class.body if isinstance(node, ast.AnnAssign)}
    assert theirs == set(AUGMENTATION_KEYS) - {"openclip_keys"}


def test_a_run_with_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to train on and nothing to evaluate: pass --train-data"):
        parse([])


@pytest.mark.parametrize(
    "line", ["--val-data a.tar", "--imagenet-val d", "--imagenet-v2 d", "--zeroshot-data d", "--retrieval-data d"]
)
def test_an_evaluation_set_alone_is_a_run(line):
    assert parse(line.split()).config.data.train_data is None


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"--batch-size 0 must be at least 1\.\n--epochs 0 must be"):
        parse_line("--batch-size 0 --epochs 0")


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="--report-to tb reports nowhere"):
        validate(Config(logging=LoggingConfig(report_to="tb")))


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("", set()),
        ("none", set()),
        ("tensorboard", {"tensorboard"}),
        ("wandb,tensorboard", {"wandb", "tensorboard"}),
        ("tensorboard+wandb", {"wandb", "tensorboard"}),
        ("all", {"wandb", "tensorboard"}),
    ],
)
def test_reports_go_where_openclip_sends_them(report_to, expected):
    assert report_targets(report_to) == expected
    assert parse_line(f"--report-to '{report_to}'").config.logging.report_to == report_to


def test_logs_are_disabled_by_none_in_any_case_and_by_nothing():
    assert [logs_disabled(logs) for logs in ("none", "None", "", "logs", "./none/")] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("line", "notices"),
    [
        ("", []),
        ("--lock-image --lock-image-unlocked-groups 2", []),
        (
            "--lock-image-unlocked-groups 2",
            ["--lock-image-unlocked-groups 2 has no effect: --lock-image is not given."],
        ),
        ("--lock-text-freeze-layer-norm", ["--lock-text-freeze-layer-norm has no effect: --lock-text is not given."]),
        (
            "--skip-scheduler --warmup 5",
            ["--warmup 5 has no effect: --skip-scheduler keeps the learning rate constant."],
        ),
        ("--epochs-cooldown 5", ["--epochs-cooldown 5 has no effect: --lr-scheduler cosine has no cool-down."]),
        ("--torchcompile-mode x", ["--torchcompile-mode x has no effect: --torchcompile is not given."]),
        ("--fsdp-shard-ranks 4", ["--fsdp-shard-ranks 4 has no effect: --fsdp is not given."]),
        ("--fsdp --ddp-static-graph", ["--ddp-static-graph has no effect: --fsdp takes the place of DDP."]),
        (
            "--grad-reduce-dtype bf16 --precision pure_bf16",
            ["--grad-reduce-dtype bf16 has no effect: --precision pure_bf16 has no other gradients."],
        ),
        ("--fsdp --grad-reduce-dtype bf16 --precision pure_bf16", []),
        ("--loss-dist-impl gather", ["--loss-dist-impl gather has no effect: --siglip is not given."]),
        ("--momentum 0.9", ["--momentum 0.9 has no effect: --opt adamw has no such setting."]),
        (
            "--dataset-type webdataset --csv-img-key x",
            ["--csv-img-key x has no effect: --dataset-type webdataset reads no table."],
        ),
        (
            "--dataset-type csv --dataset-resampled",
            ["--dataset-resampled has no effect: --dataset-type csv reads no shards."],
        ),
        ("--val-frequency 3", ["--val-frequency 3 has no effect: --val-data is not given."]),
        ("--wandb-notes x", ["--wandb-notes x has no effect: --report-to names no wandb."]),
        (
            "--logs none --resume latest --save-most-recent",
            [
                "--save-most-recent has no effect: --logs none writes nothing.",
                "--resume latest has no effect: --logs none holds no checkpoints, so the run starts anew.",
            ],
        ),
        ("--logs none --resume a.pt", []),
    ],
)
def test_a_setting_that_changes_nothing_is_named(line, notices):
    assert list(parse_line(line).notices) == notices
    assert inert_settings(parse_line(line).config) == notices
