"""Reads and writes settings as YAML: the same names as flags, judged by the same parser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.arguments import WORDS_OF_KIND, Values, dashed, parse_words, words_for
from training.config import Config
from training.flags import BY_OPTION, CONFIG_FILE_OPTION, DEFAULTS, FLAGS, Flag, Verdict, nearest, setting_of


def to_yaml(config: Config) -> str:
    """All settings as YAML that ``--config`` reads back to the same configuration."""
    supported = (flag for flag in FLAGS if flag.verdict is Verdict.SUPPORTED)
    settings = {flag.name: _plain(setting_of(config, flag)) for flag in supported}
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
    return text


def read_yaml(path: Path) -> Values:
    """The values in a YAML file, by field name.

    Raises:
        ValueError: a file that cannot be read, a key that is no flag or comes twice, a value of the wrong type.
    """
    try:
        document = _load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE_OPTION} {path} cannot be read: {error}. Pass an existing YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{CONFIG_FILE_OPTION} {path} is not a file of flags: {error}") from error
    values: Values = {}
    for key, value in document.items():
        flag = _flag_of_key(str(key), path)
        if flag.field_name in values:
            raise ValueError(f"{CONFIG_FILE_OPTION} {path} has {flag.name} twice: keep one of them.")
        try:
            values[flag.field_name] = _value_from_yaml(flag, value)
        except ValueError as error:
            raise ValueError(f"{CONFIG_FILE_OPTION} {path}: {error}") from error
    return values


def _load_yaml(text: str) -> dict[Any, Any]:
    # PyYAML keeps the last of two equal keys without a word, so the keys are counted before they are merged.
    root = yaml.compose(text)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("its top level must be `flag: value` lines.")
    for node in (root, *(value for _, value in root.value if isinstance(value, yaml.MappingNode))):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"it has {key} twice: keep one of them.")
    document: dict[Any, Any] = yaml.safe_load(text)
    return document


def _flag_of_key(key: str, path: Path) -> Flag:
    option = dashed(key)
    if option in BY_OPTION:
        return BY_OPTION[option]
    names = [known.removeprefix("--") for known in BY_OPTION]
    raise ValueError(
        f"{CONFIG_FILE_OPTION} {path}: {key} is not a flag{nearest(option.removeprefix('--'), names)}. "
        "Keys are the names of flags, without abbreviations."
    )


def _value_from_yaml(flag: Flag, value: Any) -> Any:
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise ValueError(f"{flag.name}: {value!r} must be true or false.")
        return value
    if value is None:
        default = setting_of(DEFAULTS, flag) if flag.verdict is Verdict.SUPPORTED else flag.off
        if default is not None:
            raise ValueError(f"{flag.name} has no value: give it one, or leave the line out.")
        return None
    if flag.kind == "pairs" and not isinstance(value, dict):
        raise ValueError(f"{flag.name}: {value!r} must be a mapping, such as {{scale: [0.4, 1.0]}}.")
    if flag.kind not in WORDS_OF_KIND and isinstance(value, bool | list | dict):
        raise ValueError(f"{flag.name}: {value!r} must be one {flag.kind} (in quotes if it is a word).")
    # Through the parser of the command line, so that types, choices and typos are judged by the same code.
    return parse_words(words_for(flag, value))[flag.field_name]


def _plain(value: Any) -> Any:
    """Tuples become lists: YAML has no tuples."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
