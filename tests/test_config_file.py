"""Settings in YAML: the names of flags, judged by the same parser, and overruled by the command line."""

from __future__ import annotations

import pytest

from training.cli import parse
from training.flags import BY_OPTION


@pytest.fixture
def read(tmp_path):
    """Parses a YAML text given as ``--config``, with more words of a command line."""

    def parse_text(text: str, *words: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return parse(["--config", str(path), *words])

    return parse_text


def test_keys_are_flags_with_dashes_or_underscores(read):
    config = read("train-data: a.tar\nbatch_size: 3\nlr: 1e-3\nmodel: ViT-B-32\n").config
    assert (config.data.batch_size, config.optim.lr, config.optim.beta2) == (3, 1e-3, 0.98)


def test_mappings_lists_and_switches_are_read(read):
    config = read(
        "train-data: a.tar\naug-cfg: {scale: [0.4, 1.0], use_timm: true}\nopt-kwargs:\n  name: word\n"
        "image-mean: [0.5, 0.5, 0.5]\nforce-image-size: 64\nwd-exclude: []\nlocal-loss: true\ngather-with-grad: false\n"
    ).config
    assert config.image.aug_cfg == {"scale": (0.4, 1.0), "use_timm": True}
    assert config.optim.opt_kwargs == {"name": "word"}
    assert (config.image.image_mean, config.model.force_image_size) == ((0.5, 0.5, 0.5), (64,))
    assert (config.loss.local_loss, config.loss.gather_with_grad) == (True, False)


def test_the_command_line_wins_over_the_file(read):
    config = read(
        "train-data: a.tar\nbatch-size: 3\naug-cfg: {scale: [0.4, 1.0]}\n", "--batch-size", "5", "--local-loss"
    ).config
    assert (config.data.batch_size, config.loss.local_loss, config.image.aug_cfg) == (5, True, {"scale": (0.4, 1.0)})


def test_a_later_file_wins_over_an_earlier_one(read, tmp_path):
    (tmp_path / "more.yaml").write_text("local-loss: false\nbatch-size: 7\n")
    config = read("train-data: a.tar\nlocal-loss: true\nworkers: 1\n", "--config", str(tmp_path / "more.yaml")).config
    assert (config.loss.local_loss, config.data.batch_size, config.data.workers) == (False, 7, 1)


def test_an_empty_file_changes_nothing(read):
    assert read("", "--train-data", "a.tar") == parse(["--train-data", "a.tar"])


def test_null_is_allowed_where_it_is_the_default(read):
    assert read("train-data: a.tar\nlr: null\ndistill-model: null\n") == parse(["--train-data", "a.tar"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", r"run\.yaml: batchsize is not a flag \(nearest: batch-size\)\. Keys are the names of flags"),
        ("batch: 3", "batch is not a flag .* without abbreviations"),
        ("config: other.yaml", "config is not a flag"),
        ("lr: fast", "run.yaml: --lr: 'fast' is not a number"),
        ("workers: 1.5", "--workers: '1.5' is not a whole number"),
        ("workers: [1, 2]", r"workers: \[1, 2\] must be one integer"),
        ("name: yes", r"name: True must be one text \(in quotes if it is a word\)"),
        ("local-loss: 1", "local-loss: 1 must be true or false"),
        ("precision: fp8", "--precision 'fp8' is not one of"),
        ("precision: null", "precision has no value: give it one, or leave the line out"),
        ("aug-cfg: scale", "aug-cfg: 'scale' must be a mapping"),
        ("aug-cfg: {scall: 1}", r"--aug-cfg scall=1 is not an augmentation key \(nearest: scale\)"),
        ("lr: 1\nlr: 2", "run.yaml is not a file of flags: it has lr twice"),
        ("aug-cfg: {scale: 1, scale: 2}", "it has scale twice"),
        ("batch-size: 1\nbatch_size: 2", "run.yaml has batch-size twice: keep one of them"),
        ("- lr", "its top level must be `flag: value` lines"),
        ("lr: {", "run.yaml is not a file of flags: while parsing"),
        ("horovod: true", "--horovod is refused"),
        ("remote-sync-frequency: null", "remote-sync-frequency has no value"),
    ],
)
def test_a_bad_file_is_explained(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"--config .*none\.yaml cannot be read: .*Pass an existing YAML file"):
        parse(["--config", str(tmp_path / "none.yaml")])


def test_a_switch_of_an_unsupported_flag_may_be_false(read):
    off = "".join(f"{flag.name}: false\n" for flag in BY_OPTION.values() if flag.kind == "switch")
    assert read(f"train-data: a.tar\n{off}") == parse(["--train-data", "a.tar"])


def test_a_flag_without_effect_is_named_from_a_file_too(read):
    (notice,) = read("train-data: a.tar\nlength-bucketing: true\n").notices
    assert notice.startswith("--length-bucketing has no effect here: captions have the fixed length")
