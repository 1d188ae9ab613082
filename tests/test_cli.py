"""From command lines to configurations: historical ones unchanged, abbreviations, YAML, errors, and back again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.params import parse_args as parse_as_openclip

from training.arguments import parse_command_line
from training.cli import config_values, load_config, parse, parse_args, parse_or_exit, to_flags, to_yaml
from training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ImageConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
)
from training.flags import BY_OPTION, CONFIG_FILE_OPTION, FLAGS, Verdict

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = [flag for flag in FLAGS if flag.verdict is Verdict.SUPPORTED]

JURECA = r"""
--aug-cfg scale='(0.4, 1.0)' color_jitter='(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8 gray_scale_prob=0.2 use_timm=True \
--save-frequency 1 \
--zeroshot-frequency 1 \
--dataset-type webdataset \
--train-data '/path/to/data' \
--report-to tensorboard \
--train-num-samples 1398270000 \
--warmup 2000 \
--batch-size 896 \
--epochs 24 \
--workers 8 \
--model ViT-B-32-256 \
--logs logs \
--seed 0 \
--ddp-static-graph \
--local-loss \
--gather-with-grad \
--lr 0.001 \
--log-every-n-steps 20 \
--save-most-recent \
--resume latest \
--grad-checkpointing \
--precision amp_bfloat16 \
--beta1 0.9 \
--beta2 0.95 \
--wd 0.2
"""  # noqa: E501
XXLARGE = r"""
--save-frequency 1 \
--name "xxlarge-2b-81920-bf16" \
--resume "latest" \
--logs "/runs" \
--log-every-n-steps 50 \
--train-data="pipe:aws s3 cp s3://laion5b/laion2B-data/{000000..231349}.tar -" \
--train-num-samples 135646078 \
--dataset-type webdataset \
--warmup 10000 \
--batch-size=80 \
--epochs=256 \
--dataset-resampled \
--aug-cfg use_timm=True scale='(0.33, 1.0)' re_prob=0.35 \
--precision amp_bfloat16 \
--grad-clip-norm 5.0 \
--lr 1e-3 \
--workers=6 \
--beta2 0.98 \
--model "convnext_xxlarge" \
--seed 0 \
--ddp-static-graph \
--local-loss \
--gather-with-grad \
--grad-checkpointing \
--report-to "tensorboard"
"""
XXLARGE_REWOUND = (
    XXLARGE.replace("81920-bf16", "81920-r-bf16")
    .replace("--batch-size=80", "--batch-size=88")
    .replace("scale='(0.33, 1.0)' re_prob=0.35", "scale='(0.3, 1.0)' re_prob=0.4")
    .replace("--lr 1e-3", "--lr 2e-3")
)
CSV = r"--train-data a.csv --csv-separator ',' --csv-img-key path --csv-caption-key caption --val-data b.csv"
FP8 = "--train-data a.tar --precision amp_bf16 --fp8 rowwise"
MANIFEST = "--train-data-manifest sources.yaml --dataset-resampled --train-num-samples 100"
TIMM = "--train-data a.tar --opt timm/lamb --lr 1e-3 --momentum 0.9 --force-image-size 224 192 --image-mean 0.5 0.5 0.5"
# Every setting away from its default; a new flag must be added here, and so is written and read back by the tests.
EVERYTHING = r"""
--train-data a.tar::b.tar --train-data-upsampling-factors 1::0.5 --val-data v.tar --train-num-samples 10
--val-num-samples 5 --dataset-type webdataset --dataset-resampled --csv-separator ';' --csv-img-key i
--csv-caption-key c --image-key jpg --text-key caption --max-image-pixels 0 --shuffle-block 1 --batch-size 2
--json-text-key 'a;b' --json-text-key-probs 0.25 0.75 --max-bad-samples 0.5 --data-lanes 8
--decode reference --s3-native off --cache-shards c --cache-gib 1.5 --trace-samples
--workers 0 --image-mean 0.1 0.2 0.3 --image-std 1e-5 --image-interpolation bilinear --image-resize-mode squash
--aug-cfg scale=(0.4,1.0) color_jitter=0.4 use_timm=True --model 'hf-hub:some/ViT' --pretrained weights.pt
--pretrained-image --cache-dir cache --lock-image --lock-image-unlocked-groups 1 --lock-image-freeze-bn-stats
--lock-text --lock-text-unlocked-layers 2 --lock-text-freeze-layer-norm --force-context-length 32
--force-image-size 64 --force-quick-gelu --force-patch-dropout 0.5 --force-custom-text --local-loss
--gather-with-grad --siglip --loss-dist-impl gather --opt NAdamW --lr 1e-4 --beta1 0.8 --beta2 0.9 --eps 1e-7
--wd 0 --momentum 0.9 --opt-kwargs fused=True name=word text="'7'" betas=(0.1,0.2) nested={'a':[1,2]}
--wd-exclude '*.bias' 'x?' --grad-clip-norm 1 --epochs 3 --epochs-cooldown 1 --warmup 0 --skip-scheduler
--lr-scheduler const-cooldown --lr-cooldown-end 1e-6 --lr-cooldown-power 2 --device cuda:1 --dist-url tcp://h:1
--dist-backend gloo --slurm-host-suffix i --no-set-device-rank --ddp-static-graph --use-bn-sync --precision fp32
--fsdp --fsdp-shard-ranks 4 --fsdp-no-reshard-after-forward --fsdp-offload-cpu --fsdp-checkpoint sharded
--accum-freq 2 --grad-checkpointing --torchcompile --torchcompile-strategy step --torchcompile-backend eager
--torchcompile-mode reduce-overhead --seed 7 --resume=-odd/path.pt --save-frequency 0 --save-most-recent
--save-every-n-steps 9 --keep-checkpoints 3 --delete-previous-checkpoint --imagenet-val in --imagenet-v2 v2
--zeroshot-data z --retrieval-data r --zeroshot-frequency 0 --val-frequency 0 --val-retrieval-chunk-size 0
--evaluate-at-start --logs /runs --name 2024-01-01 --log-local --report-to all --wandb-notes 'on: a "test" # 1'
--wandb-project-name null --debug --copy-codebase --log-every-n-steps 1 --log-metric-every-n-steps 1
--save-every-n-minutes 2.5 --keep-every-n-steps 100 --keep-best clip_val_loss --max-save-failures 1
--allow-restart-from-zero --allow-config-change epochs wd --remote-sync s3://bucket/runs --remote-sync-frequency 60
--remote-sync-protocol fsspec --guard off --guard-loss-z 6 --guard-grad-z 5 --guard-warmup 50 --guard-damp-steps 9
--guard-damp-lr 0.9 --guard-damp-beta2 0.9 --guard-skip-steps 10 --guard-max-rewinds 1 --telemetry-every-n-steps 7
--checksum-every-n-steps 11 --on-divergence rewind --timeout-start 100 --timeout-step 50 --timeout-evaluation 70
--timeout-heartbeat 9 --take-over --text-packing off --gather-dtype bf16 --phases phases.yaml
--attention-kernel flash --channels-last on --grad-checkpointing-policy selective
--grad-reduce-dtype bf16 --gc-every-n-steps 10
"""


def words(line: str) -> list[str]:
    return shlex.split(line.replace("\\\n", " "))


def test_the_jureca_command_line_parses_unchanged():
    expected = Config(
        data=DataConfig(
            train_data="/path/to/data",
            train_num_samples=1_398_270_000,
            dataset_type="webdataset",
            batch_size=896,
            workers=8,
        ),
        image=ImageConfig(
            aug_cfg={
                "scale": (0.4, 1.0),
                "color_jitter": (0.32, 0.32, 0.32, 0.08),
                "color_jitter_prob": 0.8,
                "gray_scale_prob": 0.2,
                "use_timm": True,
            }
        ),
        model=ModelConfig(model="ViT-B-32-256"),
        loss=LossConfig(local_loss=True, gather_with_grad=True),
        optim=OptimConfig(lr=0.001, beta1=0.9, beta2=0.95, eps=1e-6, wd=0.2),
        schedule=ScheduleConfig(epochs=24, warmup=2000),
        engine=EngineConfig(precision="amp_bfloat16", ddp_static_graph=True, grad_checkpointing=True, seed=0),
        checkpoint=CheckpointConfig(resume="latest", save_frequency=1, save_most_recent=True),
        evaluation=EvaluationConfig(zeroshot_frequency=1),
        logging=LoggingConfig(logs="logs", report_to="tensorboard", log_every_n_steps=20),
    )
    assert parse(words(JURECA)).config == expected


def test_the_convnext_xxlarge_command_line_parses_unchanged():
    expected = Config(
        data=DataConfig(
            train_data="pipe:aws s3 cp s3://laion5b/laion2B-data/{000000..231349}.tar -",
            train_num_samples=135_646_078,
            dataset_type="webdataset",
            dataset_resampled=True,
            batch_size=80,
            workers=6,
        ),
        image=ImageConfig(aug_cfg={"use_timm": True, "scale": (0.33, 1.0), "re_prob": 0.35}),
        model=ModelConfig(model="convnext_xxlarge"),
        loss=LossConfig(local_loss=True, gather_with_grad=True),
        optim=OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-8, grad_clip_norm=5.0),
        schedule=ScheduleConfig(epochs=256, warmup=10_000),
        engine=EngineConfig(precision="amp_bfloat16", ddp_static_graph=True, grad_checkpointing=True),
        checkpoint=CheckpointConfig(resume="latest"),
        logging=LoggingConfig(
            logs="/runs", name="xxlarge-2b-81920-bf16", report_to="tensorboard", log_every_n_steps=50
        ),
    )
    assert parse(words(XXLARGE)).config == expected


@pytest.mark.parametrize("line", [JURECA, XXLARGE, XXLARGE_REWOUND, CSV, TIMM], ids=lambda line: line.split()[-1])
def test_openclips_own_parser_reads_the_same_values(line):
    theirs = vars(parse_as_openclip(words(line)))
    ours = config_values(parse(words(line)).config)
    if "--precision" not in line:
        theirs["precision"] = "amp_bf16"
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 70
    assert {name: list(ours[name]) if isinstance(ours[name], tuple) else ours[name] for name in shared} == {
        name: theirs[name] for name in shared
    }


def test_what_was_an_unambiguous_prefix_in_openclip_stays_one():
    options = [flag.option for flag in FLAGS if flag.origin == "3.3.0"]
    taken = [*options, "--help"]
    checked = 0
    for option in options:
        flag = BY_OPTION[option]
        value = (
            []
            if flag.kind == "switch"
            else [flag.choices[0] if flag.choices else "a=1" if flag.kind == "pairs" else "1"]
        )
        for end in range(3, len(option)):
            prefix = option[:end]
            if sum(other.startswith(prefix) for other in taken) == 1 and prefix not in BY_OPTION:
                assert parse_command_line([prefix, *value]).keys() == {flag.field_name}, prefix
                checked += 1
    assert checked > 500


def test_a_prefix_of_our_own_flag_works():
    assert parse(["--train-data", "a.tar", "--shuf", "3"]).config.data.shuffle_block == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--lock-i",
            "--lock-i is ambiguous: it may be --lock-image, --lock-image-unlocked-groups, .* Write more of it",
        ),
        ("--batchsize 3", r"--batchsize is not a flag \(nearest: --batch-size\)"),
        ("--batch_size 3", r"--batch_size is not a flag \(nearest: --batch-size\)"),
        ("--xyzzy", r"--xyzzy is not a flag\. --help"),
        ("-lr 3", r"-lr is not a flag \(nearest: --lr\)"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--workers 1.5", "--workers: '1.5' is not a whole number"),
        ("--lr", "--lr: expected one argument"),
        ("--local-loss=true", "--local-loss is a switch and takes no value: leave =true out"),
        ("--lr 1 stray", "'stray' belongs to no flag: quote values with spaces"),
        ("--precision amp_bf32", r"--precision 'amp_bf32' is not one of amp, .*\(nearest: amp_bf16\)"),
        ("--dataset-type synthetic-audio", "--dataset-type synthetic-audio is refused: audio towers are not part"),
        ("--aug-cfg scale='(0.4,' 1.0)", r"--aug-cfg '1\.0\)' is not key=value: quote values with spaces"),
        ("--aug-cfg =3", "--aug-cfg '=3' is not key=value"),
    ],
)
def test_a_bad_command_line_is_explained(line, message):
    with pytest.raises(ValueError, match=message):
        parse(["--train-data", "a.tar", *words(line)])


def test_key_value_words_are_literals_or_else_text():
    optim = parse(
        ["--train-data", "a.tar", "--opt-kwargs", "a=1", "", "b=[1, (2, 3)]", "c=word", "d=x=y", "e=(1,"]
    ).config.optim
    assert optim.opt_kwargs == {"a": 1, "b": (1, (2, 3)), "c": "word", "d": "x=y", "e": "(1,"}


def test_the_last_of_two_equal_flags_wins():
    assert parse(["--train-data", "a.tar", "--lr", "1", "--lr", "2"]).config.optim.lr == 2


def test_a_tab_may_be_written_as_two_characters():
    assert parse(["--train-data", "a.csv", "--csv-separator", r"\t"]).config.data.csv_separator == "\t"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--model ViT-B-32", (5e-4, 0.9, 0.98, 1e-6)),
        ("--model convnext_base_w", (5e-4, 0.9, 0.999, 1e-8)),
        ("--model hf-hub:org/MobileVIT --beta2 0.95 --lr 1", (1, 0.9, 0.95, 1e-6)),
        ("--model ViT-B-32 --opt timm/lamb", (None, None, None, None)),
        ("--model ViT-B-32 --opt AdamW", (5e-4, 0.9, 0.98, 1e-6)),
    ],
)
def test_optimizer_defaults_follow_the_name_of_the_model(line, expected):
    optim = parse(["--train-data", "a.tar", *words(line)]).config.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == expected


WORDS = st.one_of(
    st.sampled_from([flag.option for flag in FLAGS]),
    st.sampled_from([flag.option[: 3 + len(flag.option) // 2] for flag in FLAGS]),
    st.from_regex(r"(--?)?[a-z_-]{0,12}=?[a-z0-9.,()' -]{0,8}", fullmatch=True).filter(lambda word: "-h" not in word),
)


@given(st.lists(WORDS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_words_give_a_configuration_or_an_explanation(given_words):
    try:
        config = parse(["--train-data", "a.tar", *given_words]).config
    except ValueError as error:
        assert str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert parse(to_flags(config)).config == config


def given_value(flag) -> list[str]:
    """Words that ask something of an unsupported flag."""
    if flag.kind == "switch":
        return [flag.option]
    other_choices = [choice for choice in flag.choices if choice != flag.off]
    return [flag.option, other_choices[0] if other_choices else "7"]


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.verdict is Verdict.REFUSED], ids=lambda flag: flag.name
)
def test_a_refused_flag_is_refused_with_the_reason(flag):
    with pytest.raises(ValueError, match=rf"^{flag.option}( \S+)? is refused: {flag.note[:20]}"):
        parse(["--train-data", "a.tar", *given_value(flag)])


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.verdict is Verdict.REFUSED and flag.off], ids=lambda flag: flag.name
)
def test_a_refused_flag_may_be_given_its_default(flag):
    assert parse(["--train-data", "a.tar", flag.option, str(flag.off)]) == parse(["--train-data", "a.tar"])


@pytest.mark.parametrize(
    "flag", [flag for flag in FLAGS if flag.verdict is Verdict.IGNORED], ids=lambda flag: flag.name
)
def test_a_flag_without_effect_is_accepted_with_one_warning(flag):
    without = parse(["--train-data", "a.tar"])
    with pytest.warns(UserWarning, match=rf"^{flag.option}( \S+)? has no effect here: .+\.$") as caught:
        config = parse_args(["--train-data", "a.tar", *given_value(flag)])
    assert len(caught) == 1
    assert config == without.config


def test_zero_given_to_a_flag_without_effect_is_not_taken_for_absent():
    (notice,) = parse(["--train-data", "a.tar", "--train-loss-ema-samples", "0"]).notices
    assert notice.startswith("--train-loss-ema-samples 0 has no effect here")


def test_an_ordinary_command_line_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_args(words(XXLARGE))


def test_every_setting_survives_being_written_as_flags_and_as_yaml(tmp_path):
    config = parse(words(EVERYTHING)).config
    default = config_values(Config())
    # A manifest stands in the place of --train-data, and a parent in that of --resume PATH; fp8 is not for FSDP.
    untouched = [name for name, value in config_values(config).items() if value == default[name]]
    assert untouched == ["train_data_manifest", "fp8", "branch_from"]
    assert parse(to_flags(config)).config == config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("line", [JURECA, XXLARGE, CSV, TIMM, FP8, MANIFEST], ids=lambda line: line.split()[-1])
def test_a_configuration_written_as_yaml_or_flags_reads_back_the_same(line, tmp_path):
    config = parse(words(line)).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert parse(to_flags(config)).config == config


def test_a_bad_command_line_exits_with_code_2_and_the_reason(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_or_exit(["--batch-size", "0"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "python -m training.main: error: " in error
    assert "--batch-size 0 must be at least 1." in error


def test_a_good_command_line_is_returned_with_its_notices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--train-data", "a.tar", "--zeroshot-frequency", "5"])
    parsed = parse_or_exit()
    assert parsed.config.data.train_data == "a.tar"
    assert parsed.notices == (
        "--zeroshot-frequency 5 has no effect: no zero-shot data is given (--imagenet-val, --zeroshot-data).",
    )


def test_help_lists_every_supported_flag_and_none_that_is_not(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"])
    assert exit_info.value.code == 0
    listed = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}
    assert {flag.option for flag in SUPPORTED} | {CONFIG_FILE_OPTION} <= listed
    assert "--horovod" not in listed


def test_a_command_line_is_read_and_a_run_named_without_torch(tmp_path):
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'open_clip'): sys.modules[name] = None\n"
        "from datetime import datetime\n"
        "from training.cli import parse_or_exit\n"
        "from training.naming import choose_run_name, run_paths\n"
        "config = parse_or_exit(sys.argv[1:]).config\n"
        "sys.stdout.write(str(run_paths(config, name=choose_run_name(config, date=datetime.now())).root))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [*words(XXLARGE), "--logs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout == str(tmp_path / "xxlarge-2b-81920-bf16")
