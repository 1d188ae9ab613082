"""Reads a curriculum (``--phases FILE``): which settings a run has from which sample on. No torch here.

    - until_samples: 1_000_000      a phase ends with the first step at or past so many samples of the whole run
      image_size: 112               what a phase does not name is as the flags say
      text_length: 16
    - image_size: 224               the last one goes on to the end of the run

The trainer and ``clipyard submit`` read a file with the same code. What counts is its content, not its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from training.config import Config
from training.flags import nearest
from training.validation import validate

_UNTIL = "until_samples"
SETTINGS = ("image_size", "patch_dropout", "text_length", "batch_size", "aug_cfg")
"""What a phase may set, beside its end."""


@dataclass(frozen=True)
class Phase:
    """A part of a run with settings of its own."""

    number: int
    """From 1."""
    begin: int
    """Samples seen when it begins; the step that reaches them still belongs to the phase before."""
    end: int | None
    """None: it goes on to the end of the run."""
    settings: Mapping[str, Any]
    """As the file names them, in JSON types."""
    config: Config
    """The run's, with these settings."""

    @property
    def text_length(self) -> int | None:
        """Tokens that captions are cut at; None: the context length."""
        return self.settings.get("text_length")

    def __str__(self) -> str:
        shown = [f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items()]
        return ", ".join(shown) or "as the flags say"


@dataclass(frozen=True)
class Phases:
    """All phases of a run, in order; a run without ``--phases`` is a single one."""

    all: tuple[Phase, ...]
    path: str | None = None

    def __len__(self) -> int:
        return len(self.all)

    def at(self, samples_seen: int) -> Phase:
        """The phase of the step that is taken after so many samples."""
        return next(phase for phase in self.all if phase.end is None or samples_seen < phase.end)

    def as_json(self) -> list[dict[str, Any]] | None:
        """What the checkpoint remembers, and a resume compares; None without ``--phases``."""
        if self.path is None:
            return None
        return [({} if phase.end is None else {_UNTIL: phase.end}) | dict(phase.settings) for phase in self.all]

    def check(self, *, samples_per_epoch: int, epochs: int, ranks: int) -> list[str]:
        """What is worth a remark, once the length of the run is known.

        Args:
            ranks: times micro-steps: batches in a step.

        Raises:
            ValueError: a step that is more than an epoch.
        """
        remarks = []
        for phase in self.all:
            batch = phase.config.data.batch_size
            if batch * ranks > samples_per_epoch:
                raise ValueError(
                    f"{self._place(phase)}: its global batch of {batch * ranks} ({batch} per rank x {ranks}) is more "
                    f"than an epoch of {samples_per_epoch} samples: lower its batch_size."
                )
            if phase.end is not None and phase.end - phase.begin < batch * ranks:
                length = phase.end - phase.begin
                remarks.append(f"Phase {phase.number} has {length} samples, less than one step of {batch * ranks}.")
        total = samples_per_epoch * epochs
        remarks += [
            f"Phase {phase.number} is left out: the last step of the phase before ends after {seen:,} samples, and its "
            f"until_samples are {phase.end:,}."
            for phase, seen, steps in self._walk(total, ranks=ranks)
            if steps == 0 and phase.begin < total
        ]
        unreached = [phase for phase in self.all if phase.begin >= total]
        if unreached:
            remarks.append(
                f"The run ends after {total:,} samples, so phase {unreached[0].number} (from "
                f"{unreached[0].begin:,}) is never reached: lower until_samples in {self.path}, or raise --epochs."
            )
        return remarks

    def steps_until(self, samples: int, *, ranks: int) -> int:
        """Steps that a run takes on its way to so many samples.

        Args:
            ranks: times micro-steps: batches in a step.
        """
        return sum(steps for _, _, steps in self._walk(samples, ranks=ranks))

    def _walk(self, total: int, *, ranks: int) -> Iterator[tuple[Phase, int, int]]:
        """(phase, samples seen when it begins, its steps): a last step may reach into the next phase, and past it."""
        seen = 0
        for phase in self.all:
            size = phase.config.data.batch_size * ranks
            steps = max(0, -(-((total if phase.end is None else min(phase.end, total)) - seen) // size))
            yield phase, seen, steps
            seen += steps * size

    def _place(self, phase: Phase) -> str:
        return _place(self.path, phase.number) if self.path is not None else "--batch-size"


def read_phases(config: Config) -> Phases:
    """The phases of a configuration; without ``--phases`` one that has all of its settings.

    Raises:
        ValueError: no such file, or one that does not describe phases.
    """
    path = config.schedule.phases
    if path is None:
        return Phases((Phase(1, 0, None, {}, config),))
    phases: list[Phase] = []
    entries = _read(path)
    for number, entry in enumerate(entries, start=1):
        begin = phases[-1].end if phases else 0
        assert begin is not None
        phases.append(_phase(entry, number, begin, path=path, is_last=number == len(entries), config=config))
    return Phases(tuple(phases), path)


def past_differs(saved: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]] | None, seen: int) -> bool:
    """Whether two curricula differ in what they say of the first ``seen`` samples."""
    return list(_until(saved or [{}], seen)) != list(_until(now or [{}], seen))


def _until(phases: Sequence[Mapping[str, Any]], seen: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(end, settings) of the phases that have begun before ``seen`` samples."""
    begin = 0
    for phase in phases:
        if begin >= seen:
            return
        begin = min(phase.get(_UNTIL, seen), seen)
        yield begin, {name: value for name, value in phase.items() if name != _UNTIL}


def _read(path: str) -> list[Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--phases {path} cannot be read: {error}. Pass an existing YAML file.") from error
    try:
        content = yaml.safe_load(text)
        _check_keys(yaml.compose(text), path)
    except yaml.YAMLError as error:
        raise ValueError(f"--phases {path} is not YAML: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"--phases {path} must be a list of phases, each beginning with `- until_samples: N`.")
    return content


def _check_keys(root: yaml.Node | None, path: str) -> None:
    """PyYAML keeps the last of two equal keys without a word."""
    for number, node in enumerate(root.value if isinstance(root, yaml.SequenceNode) else (), start=1):
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{_place(path, number)}: {key} is there twice: keep one of them.")


def _phase(entry: Any, number: int, begin: int, *, path: str, is_last: bool, config: Config) -> Phase:
    place = _place(path, number)
    known = (_UNTIL, *SETTINGS)
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: {entry!r} is no phase: write keys and values, of {', '.join(known)}.")
    for key in entry:
        if key not in known:
            raise ValueError(f"{place}: {key} is no key{nearest(str(key), known)}: there are {', '.join(known)}.")
    end = _end(entry, begin, place=place, is_last=is_last)
    settings = {key: _value(key, entry[key], place=place) for key in SETTINGS if key in entry}
    derived = _derive(config, settings)
    try:
        validate(derived)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Phase(number, begin, end, settings, derived)


def _end(entry: Mapping[str, Any], begin: int, *, place: str, is_last: bool) -> int | None:
    if is_last:
        if _UNTIL in entry:
            raise ValueError(f"{place} is the last one and goes on to the end of the run: leave out its {_UNTIL}.")
        return None
    if _UNTIL not in entry:
        raise ValueError(f"{place} has no {_UNTIL}, so the phases after it would never begin: say where it ends.")
    end = _whole_number(entry[_UNTIL])
    if end is None or end < 1:
        raise ValueError(f"{place}: {_UNTIL} {entry[_UNTIL]!r} must be a whole number of samples, of at least 1.")
    if end <= begin:
        raise ValueError(
            f"{place}: {_UNTIL} {end} is not after the end of the phase before ({begin}): it counts the samples of the "
            "whole run, so it grows from phase to phase."
        )
    return end


def _value(key: str, value: Any, *, place: str) -> Any:
    """A setting in JSON types."""
    if key == "aug_cfg":
        if not isinstance(value, dict):
            raise ValueError(f"{place}: aug_cfg {value!r} must be a mapping, such as {{scale: [0.4, 1.0]}}.")
        return value
    if key == "patch_dropout":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{place}: patch_dropout {value!r} must be a share of at least 0 and less than 1.")
        return float(value)
    if key == "image_size":
        sizes = [_whole_number(size) for size in (value if isinstance(value, list) else [value])]
        if len(sizes) not in (1, 2) or any(size is None or size < 1 for size in sizes):
            raise ValueError(f"{place}: image_size {value!r} must be one size in pixels, or [height, width].")
        return sizes
    number = _whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"{place}: {key} {value!r} must be a whole number of at least 1.")
    return number


def _derive(config: Config, settings: Mapping[str, Any]) -> Config:
    model, data, image = config.model, config.data, config.image
    if "image_size" in settings:
        model = replace(model, force_image_size=tuple(settings["image_size"]))
    if "patch_dropout" in settings:
        model = replace(model, force_patch_dropout=settings["patch_dropout"])
    if "batch_size" in settings:
        data = replace(data, batch_size=settings["batch_size"])
    if "aug_cfg" in settings:
        # Tuples, as the command line gives them.
        values = {key: tuple(item) if isinstance(item, list) else item for key, item in settings["aug_cfg"].items()}
        image = replace(image, aug_cfg=values)
    return replace(config, model=model, data=data, image=image)


def _whole_number(value: Any) -> int | None:
    """Also of 1e6 and 2.5e8, which YAML takes for text or for a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(value if isinstance(value, int) else number) if number.is_integer() else None


def _place(path: str | None, number: int) -> str:
    return f"--phases {path}, phase {number}"
