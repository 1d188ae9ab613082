"""Class names and prompt templates: ImageNet's, and those in the text files of a webdataset evaluation set."""

from __future__ import annotations

import os
from dataclasses import dataclass

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

PLACEHOLDER = "{c}"
CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class Prompts:
    """What the classes of a set are called, and the sentences that their names are put into in place of ``{c}``."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def of_class(self, index: int) -> list[str]:
        """The prompts of one class, one per template."""
        # replace, not format: a class name or template may hold other braces.
        return [template.replace(PLACEHOLDER, self.class_names[index]) for template in self.templates]


def imagenet_prompts() -> Prompts:
    """The 1000 class names and 80 templates that OpenCLIP evaluates ImageNet with."""
    # OpenCLIP's templates are functions of the name.
    templates = tuple(template(PLACEHOLDER) for template in OPENAI_IMAGENET_TEMPLATES)
    return Prompts(tuple(IMAGENET_CLASSNAMES), templates)


def read_prompts(directory: str, *, flag: str) -> Prompts:
    """Reads ``classnames.txt`` (line i names class i) and ``zeroshot_classification_templates.txt`` of a set.

    Raises:
        ValueError: a file is missing or empty, a class has no name, or a template has no ``{c}``.
    """
    names_path = os.path.join(directory, CLASSNAMES_FILE)
    templates_path = os.path.join(directory, TEMPLATES_FILE)
    names = _read_lines(names_path, flag=flag)
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"{names_path}:{number}: empty class name: line i names class i, so none may be left out.")
    templates = []
    for number, template in enumerate(_read_lines(templates_path, flag=flag), start=1):
        if template and PLACEHOLDER not in template:
            raise ValueError(
                f"{templates_path}:{number}: template {template!r} has no {PLACEHOLDER}, the place of the class name."
            )
        if template:
            templates.append(template)
    return Prompts(tuple(names), tuple(templates))


def _read_lines(path: str, *, flag: str) -> list[str]:
    """Stripped lines without the blank ones at the end."""
    if not os.path.isfile(path):
        raise ValueError(f"{path!r} does not exist: add it, or correct {flag}.")
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file.read().rstrip().splitlines()]
    if not lines:
        raise ValueError(f"{path!r} is empty: write one entry per line, or correct {flag}.")
    return lines
