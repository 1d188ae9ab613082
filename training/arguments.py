"""Reads the words of a command line into typed values by field name, with one argparse parser made from the table."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

from training.flags import BY_FIELD, BY_OPTION, CONFIG_FILE_OPTION, FLAGS, SECTION_OF_FIELD, Flag, Verdict, nearest
from training.validation import unknown_choice

PROGRAM = "python -m training.main"
WORDS_OF_KIND = {"texts": "*", "integers": "+", "numbers": "+", "pairs": "*"}
"""Kinds of flags that take several words, with argparse's ``nargs``."""

Values = dict[str, Any]
"""What was given, by field name; a flag that was not given is absent."""

_OTHER_OPTIONS = ("-h", "--help", CONFIG_FILE_OPTION)


def parse_command_line(argv: Sequence[str]) -> Values:
    """The values of a command line, whose flags may be abbreviated as argparse allows.

    Raises:
        ValueError: an unknown or ambiguous flag, a value of the wrong type, a word that belongs to no flag.
    """
    return parse_words(_with_full_names(argv))


def parse_words(words: Sequence[str]) -> Values:
    """As ``parse_command_line``, with full flag names only."""
    namespace, rest = _parser().parse_known_args(list(words))
    if rest:
        raise ValueError(
            f"{' '.join(map(repr, rest))} belongs to no flag: quote values with spaces, "
            "such as --aug-cfg scale='(0.4, 1.0)'."
        )
    given: Values = vars(namespace)
    return {name: _typed(BY_FIELD[name], value) if name in BY_FIELD else value for name, value in given.items()}


def words_for(flag: Flag, value: Any) -> list[str]:
    """The words of a command line that give this value."""
    if flag.kind == "switch":
        return [flag.option]
    if flag.kind == "pairs":
        return [flag.option, *(f"{key}={frozen(item)!r}" for key, item in value.items())]
    if flag.kind in WORDS_OF_KIND:
        items = value if isinstance(value, list | tuple) else [value]
        return [flag.option, *(str(item) for item in items)]
    # In one word: a value may start with a dash.
    return [f"{flag.option}={value}"]


def dashed(name: str) -> str:
    """A flag's name as typed, from any spelling with dashes or underscores."""
    return f"--{name.lstrip('-').replace('_', '-')}"


def frozen(value: Any) -> Any:
    """Lists become tuples, so that the same values from YAML and from a command line are equal."""
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return value


# Flag names


def _with_full_names(argv: Sequence[str]) -> list[str]:
    """Abbreviated flags written out, as argparse itself would, but preferring OpenCLIP's flags to newer ones."""
    return [_with_full_name(token) if _looks_like_option(token) else token for token in argv]


def _looks_like_option(token: str) -> bool:
    # argparse's own rule: a dash, but neither a negative number nor a text with spaces.
    name = token.split("=", 1)[0]
    return name.strip("-") != "" and name.startswith("-") and not re.fullmatch(r"-[\d.].*", token) and " " not in name


def _with_full_name(token: str) -> str:
    name, equals, value = token.partition("=")
    full = _full_name(name)
    if equals and full in BY_OPTION and BY_OPTION[full].kind == "switch":
        raise ValueError(f"{full} is a switch and takes no value: leave {equals}{value} out.")
    return f"{full}{equals}{value}"


def _full_name(name: str) -> str:
    if name in BY_OPTION or name in _OTHER_OPTIONS:
        return name
    matches = [option for option in (*BY_OPTION, *_OTHER_OPTIONS) if name.startswith("--") and option.startswith(name)]
    # What was unambiguous in an older release stays so, whatever flags came later.
    for origins in (("3.3.0",), ("3.3.0", "HEAD")):
        older = [option for option in matches if option in BY_OPTION and BY_OPTION[option].origin in origins]
        if len(older) == 1:
            return older[0]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{name} is ambiguous: it may be {', '.join(matches)}. Write more of it.")
    known = (*BY_OPTION, *_OTHER_OPTIONS)
    raise ValueError(f"{name} is not a flag{nearest(dashed(name), known)}. --help lists all of them.")


# Values


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}. --help tells what each flag takes.")


@cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--config FILE.yaml] [flags]",
        description="Trains and evaluates a CLIP model. Flags are OpenCLIP's, and a few more.",
        epilog="What OpenCLIP has and this program has not: docs/openclip_compatibility.md.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        CONFIG_FILE_OPTION,
        metavar="FILE",
        action="append",
        help="Settings as YAML, with the names of flags; the command line wins.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in FLAGS:
        section = SECTION_OF_FIELD.get(flag.field_name, "not supported")
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        _add_argument(groups[section], flag)
    return parser


def _add_argument(group: argparse._ArgumentGroup, flag: Flag) -> None:
    options = [f"--{name}" for name in (flag.name, *flag.aliases)]
    note = flag.note if flag.verdict is Verdict.SUPPORTED else argparse.SUPPRESS
    if flag.kind == "switch":
        group.add_argument(*options, dest=flag.field_name, action="store_true", help=note)
        return
    choices = f"{{{','.join(flag.choices)}}}" if flag.choices else flag.kind.rstrip("s").upper()
    group.add_argument(
        *options,
        dest=flag.field_name,
        type=_converter(flag),
        nargs=WORDS_OF_KIND.get(flag.kind),
        metavar=choices,
        help=note,
    )


def _converter(flag: Flag) -> Callable[[str], Any]:
    if flag.kind in ("integer", "integers"):
        return _integer
    if flag.kind in ("number", "numbers"):
        return _number
    return str


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _typed(flag: Flag, value: Any) -> Any:
    """What argparse collected, as the Config holds it.

    Raises:
        ValueError: a value that is none of the flag's choices, or a pair that is none.
    """
    if flag.kind == "pairs":
        return _parse_pairs(flag, value)
    if isinstance(value, list):
        return tuple(value)
    problem = unknown_choice(flag, value) if isinstance(value, str) else None
    if problem is not None:
        raise ValueError(problem)
    return value


def _parse_pairs(flag: Flag, items: Sequence[str]) -> dict[str, Any]:
    """``a=1 b=(2,3) c=word`` as a dict; empty items, as shell variables leave them, are skipped."""
    pairs: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not item.strip():
            continue
        if not equals or not key:
            raise ValueError(
                f"{flag.option} {item!r} is not key=value: quote values with spaces, such as scale='(0.4, 1.0)'."
            )
        pairs[key] = frozen(_literal(text))
    return pairs


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # All that literal_eval is documented to raise.
        return text
