"""Class names and templates."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from training.evaluation.prompts import Prompts, imagenet_prompts, read_prompts


def write(directory: Path, *, names: str | None = "cat\ndog\n", templates: str | None = "a {c}.\n") -> Path:
    if names is not None:
        (directory / "classnames.txt").write_text(names)
    if templates is not None:
        (directory / "zeroshot_classification_templates.txt").write_text(templates)
    return directory


def test_imagenet_prompts_are_openclips() -> None:
    prompts = imagenet_prompts()
    assert len(prompts.class_names) == 1000
    for index in (0, 42, 999):
        name = open_clip.IMAGENET_CLASSNAMES[index]
        assert prompts.of_class(index) == [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_files_give_names_in_order_and_templates_without_blank_lines(tmp_path: Path) -> None:
    write(tmp_path, names="cat\nsea lion\n\n", templates="a {c}.\n\nthe {c} and the {c}\n")
    prompts = read_prompts(str(tmp_path), flag="--zeroshot-data")
    assert prompts == Prompts(("cat", "sea lion"), ("a {c}.", "the {c} and the {c}"))
    assert prompts.of_class(1) == ["a sea lion.", "the sea lion and the sea lion"]


def test_other_braces_are_left_alone() -> None:
    assert Prompts(("{0}",), ("a {c} {x}",)).of_class(0) == ["a {0} {x}"]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (None, "a {c}", r"classnames.txt' does not exist: add it, or correct --zeroshot-data"),
        ("", "a {c}", r"classnames.txt' is empty"),
        ("cat\n\ndog", "a {c}", r"classnames.txt:2: empty class name"),
        ("cat", None, r"zeroshot_classification_templates.txt' does not exist"),
        ("cat", "\n\n", r"zeroshot_classification_templates.txt' is empty"),
        ("cat", "a {c}\na photo of {}\n", r"zeroshot_classification_templates.txt:2: template 'a photo of {}' has no"),
    ],
)
def test_faulty_files_are_named_with_the_line(
    tmp_path: Path, names: str | None, templates: str | None, message: str
) -> None:
    write(tmp_path, names=names, templates=templates)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path), flag="--zeroshot-data")
