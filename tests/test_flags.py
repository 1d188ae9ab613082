"""Walks OpenCLIP's recorded flags of 3.3.0 and HEAD: each has one verdict, supported ones keep their defaults."""

from __future__ import annotations

import ast
import csv
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from training.config import Config
from training.flags import BY_OPTION, DEFAULTS, FLAGS, SECTION_OF_FIELD, Verdict, nearest, render_flag_table, setting_of

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "openclip_compatibility.md"

# docs/openclip_compatibility.md says why.
DIFFERENT_DEFAULTS = {
    ("3.3.0", "--precision"): "amp_bf16",
    ("HEAD", "--max-image-pixels"): 89_478_485,
    ("HEAD", "--torchcompile-strategy"): "block",
}
KIND_OF = {
    ("str", None): "text",
    (None, None): "text",
    ("int", None): "integer",
    ("float", None): "number",
    ("str", "*"): "texts",
    ("int", "+"): "integers",
    ("float", "+"): "numbers",
}


class Recorded(NamedTuple):
    release: str
    option: str
    default: object
    kind: str
    choices: tuple[str, ...]


def read_recorded(release: str) -> list[Recorded]:
    path = ROOT / "tests" / "recorded" / f"openclip-flags-{release.lower()}.tsv"
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
    return [
        Recorded(release, option, ast.literal_eval(default), kind_of(action, value_type, nargs), tuple(parse(choices)))
        for option, default, action, value_type, nargs, choices in rows
    ]


def parse(choices: str) -> tuple[str, ...]:
    return tuple(ast.literal_eval(choices) or ())


def kind_of(action: str, value_type: str, nargs: str) -> str:
    if action == "ParseKwargs":
        return "pairs"
    if action in ("_StoreTrueAction", "_StoreFalseAction"):
        return "switch"
    return KIND_OF[(None if value_type == "None" else value_type, None if nargs == "None" else nargs)]


RECORDED = [*read_recorded("3.3.0"), *read_recorded("HEAD")]
OLD = {recorded.option for recorded in RECORDED if recorded.release == "3.3.0"}
ALL = {recorded.option for recorded in RECORDED}


def test_the_recorded_lists_are_complete():
    assert Counter(recorded.release for recorded in RECORDED) == {"3.3.0": 90, "HEAD": 142}


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: f"{recorded.release}{recorded.option}")
def test_every_flag_of_openclip_has_one_verdict_and_takes_the_same_values(recorded):
    rows = [flag for flag in FLAGS if recorded.option.removeprefix("--") in (flag.name, *flag.aliases)]
    assert len(rows) == 1
    (flag,) = rows
    assert flag.kind == recorded.kind
    # Some of OpenCLIP's flags have choices that it checks later, so ours may have more of them written down.
    assert set(recorded.choices) <= {*flag.choices, *flag.refused_values}


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: f"{recorded.release}{recorded.option}")
def test_defaults_are_openclips_but_for_the_documented_ones(recorded):
    flag = BY_OPTION[recorded.option]
    default = setting_of(DEFAULTS, flag) if flag.verdict is Verdict.SUPPORTED else flag.off
    expected = DIFFERENT_DEFAULTS.get((recorded.release, recorded.option), recorded.default)
    if recorded.option == "--text-pooler-own-group":
        expected = not expected  # a switch that turns something off: what is recorded is the opposite
    assert (list(default) if isinstance(default, tuple) else default) == expected


def test_the_alias_of_head_is_known():
    assert BY_OPTION["--visual-layer-decay"] is BY_OPTION["--image-layer-decay"]


def test_the_table_says_where_each_flag_comes_from():
    for flag in FLAGS:
        expected = "3.3.0" if flag.option in OLD else "HEAD" if flag.option in ALL else "Clipyard"
        assert (flag.name, flag.origin) == (flag.name, expected)


def test_supported_flags_are_the_fields_of_the_config():
    names = Counter(setting.name for section in fields(Config) for setting in fields(getattr(DEFAULTS, section.name)))
    assert set(names.values()) == {1}
    assert (
        {flag.field_name for flag in FLAGS if flag.verdict is Verdict.SUPPORTED} == set(names) == set(SECTION_OF_FIELD)
    )


def test_flags_and_aliases_are_unique():
    names = Counter(name for flag in FLAGS for name in (flag.name, *flag.aliases))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_refusal_says_what_to_use_instead():
    for flag in FLAGS:
        if flag.verdict is Verdict.REFUSED:
            reason, _, remedy = flag.note.partition(". ")
            assert reason, flag.name
            assert remedy.split(" ")[0] in ("Use", "Train", "Start", "Put"), flag.name


def test_the_nearest_name_is_none_where_nothing_is_near():
    assert nearest("--batch-sise", BY_OPTION) == " (nearest: --batch-size)"
    assert nearest("--xyzzy", BY_OPTION) == ""


def test_every_flag_in_the_page_on_performance_exists() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    techniques = page.partition("## Techniques")[2].partition("\n## ")[0]
    rows = "\n".join(line for line in techniques.splitlines() if line.startswith("|"))
    # Flags of a run stand in backticks, first or after others; those of benchmarks follow a program's name.
    commands = re.findall(r"`(--[^`]+)`", rows)
    options = {option for command in commands for option in re.findall(r"--[a-z0-9-]+", command)}
    assert len(options) > 15
    assert not [option for option in options if option not in BY_OPTION]


def test_the_document_holds_the_table():
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("<!-- flags: begin -->\n")
    table, _, _ = rest.partition("\n<!-- flags: end -->")
    remedy = "put the result of training.flags.render_flag_table() between the flags: begin and end marks"
    assert table == render_flag_table(), f"{DOCUMENT.name} is out of date: {remedy}"
