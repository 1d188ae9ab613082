"""Turns a command line, and a YAML file of the same settings, into a checked ``Config``; and writes one back.

    argv ------> full flag names --+
                                   +--> argparse (types, choices) --> verdicts --> Config --> model defaults --> checks
    --config --> the same flags ---+    (the command line wins)

No torch here: a login node checks a command line without it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from training.arguments import PROGRAM, Values, parse_command_line, words_for
from training.config import Config
from training.config_file import read_yaml, to_yaml
from training.flags import BY_FIELD, CONFIG_FILE_OPTION, DEFAULTS, FLAGS, SECTION_OF_FIELD, Verdict, setting_of
from training.validation import inert_settings, validate

__all__ = [
    "Parsed",
    "config_values",
    "load_config",
    "parse",
    "parse_args",
    "parse_or_exit",
    "to_flags",
    "to_yaml",
    "validate",
    "with_model_defaults",
]

_EXIT_BAD_USAGE = 2


@dataclass(frozen=True)
class Parsed:
    """A checked configuration, and what its user should know: settings that change nothing, and why."""

    config: Config
    notices: tuple[str, ...]


def parse_or_exit(argv: Sequence[str] | None = None) -> Parsed:
    """For a program's first line: ``parse``, but an error is printed and ends the program with code 2."""
    try:
        return parse(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        raise SystemExit(_EXIT_BAD_USAGE) from None


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration of a command line; what changes nothing in it is warned about.

    Raises:
        ValueError: an unknown flag, a value that cannot be, a flag that is refused.
    """
    parsed = parse(argv)
    for notice in parsed.notices:
        warnings.warn(notice, stacklevel=2)
    return parsed.config


def parse(argv: Sequence[str]) -> Parsed:
    """As ``parse_args``, with the warnings as values: a caller shows them once, not on every rank."""
    given = parse_command_line(argv)
    values: Values = {}
    for path in given.pop("config", []):
        values |= read_yaml(Path(path))
    values |= given
    notices = _apply_verdicts(values)
    config = with_model_defaults(_build_config(values))
    validate(config)
    return Parsed(config, (*notices, *inert_settings(config)))


def load_config(path: Path) -> Config:
    """The configuration that a YAML file alone describes, such as a run directory's config.yaml."""
    return parse([f"{CONFIG_FILE_OPTION}={path}"]).config


def with_model_defaults(config: Config) -> Config:
    """Fills in what depends on the model's name: learning rate, betas and epsilon, but not for timm's optimizers.

    Source: the CLIP paper's settings (arXiv 2103.00020, appendix F), by OpenCLIP's rule for who gets which.
    """
    optim = config.optim
    if "timm" in optim.opt:
        return config
    is_vit = "vit" in config.model.model.lower()
    defaults = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if is_vit else 0.999, "eps": 1e-6 if is_vit else 1e-8}
    missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(optim, name) is None}
    return replace(config, optim=replace(optim, **missing))


def config_values(config: Config) -> dict[str, Any]:
    """Every setting by field name, as metric sinks and ``params.txt`` list them."""
    return {flag.field_name: setting_of(config, flag) for flag in FLAGS if flag.verdict is Verdict.SUPPORTED}


def to_flags(config: Config) -> list[str]:
    """The command line that gives this configuration: every setting that differs from its default."""
    words: list[str] = []
    for flag in FLAGS:
        if flag.verdict is Verdict.SUPPORTED and setting_of(config, flag) != setting_of(DEFAULTS, flag):
            words += words_for(flag, setting_of(config, flag))
    return words


def _apply_verdicts(values: Values) -> list[str]:
    """Takes out what is no setting here.

    Returns:
        One warning for each flag without effect.
    Raises:
        ValueError: a refused flag that asks for something.
    """
    notices = []
    for name in [name for name in values if BY_FIELD[name].verdict is not Verdict.SUPPORTED]:
        flag, value = BY_FIELD[name], values.pop(name)
        words = " ".join(words_for(flag, value)).replace("=", " ", 1)
        if flag.verdict is Verdict.REFUSED and value != flag.off:
            raise ValueError(f"{words} is refused: {flag.note}.")
        if flag.verdict is Verdict.IGNORED and value is not False and value is not None:
            notices.append(f"{words} has no effect here: {flag.note}.")
    return notices


def _build_config(values: Values) -> Config:
    by_section: dict[str, Values] = {section.name: {} for section in fields(Config)}
    for name, value in _normalised(values).items():
        by_section[SECTION_OF_FIELD[name]][name] = value
    return Config(**{name: replace(getattr(DEFAULTS, name), **given) for name, given in by_section.items()})


def _normalised(values: Values) -> Values:
    values = dict(values)
    if "opt" in values:
        values["opt"] = values["opt"].lower()
    if values.get("csv_separator") == "\\t":
        # Two characters, as a shell passes them on; pandas, which OpenCLIP reads CSV with, takes them for a tab.
        values["csv_separator"] = "\t"
    return values
