"""Reads site profiles: what a cluster wants to be told, each setting with the reason for it.

slurm/sites/NAME.yaml
    description        one line: the machine, its nodes, its network
    partition          used unless the user names another
    account            required | optional
    gpus_per_node, cpus_per_node                          without the second a task asks for workers + 1
    gpu_request        gres: --gres=gpu:N | gpus-per-node: --gpus-per-node=N | none: nodes come whole
    network_gbit_s     of a node, all adapters together
    node_local         directories that only one node sees: no place for a run
    setup              shell lines before anything else, [{line, why}]
    sbatch_options, srun_options                          [{option, why}]
    environment        {NAME: {value, why}}; {run} in a value is the run directory
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SITES = Path(__file__).parent / "sites"
GPU_REQUESTS = ("gres", "gpus-per-node", "none")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Setting(NamedTuple):
    """An option, a shell line or the value of a variable."""

    text: str
    why: str


@dataclass(frozen=True)
class Site:
    """What a cluster wants to be told."""

    name: str
    description: str
    partition: str | None = None
    account_required: bool = False
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    gpu_request: str = "gres"
    network_gbit_s: float | None = None
    node_local: tuple[str, ...] = ()
    setup: tuple[Setting, ...] = ()
    sbatch_options: tuple[Setting, ...] = ()
    srun_options: tuple[Setting, ...] = ()
    environment: Mapping[str, Setting] = field(default_factory=dict)

    def cpus_per_task(self, tasks_per_node: int) -> int | None:
        """An even share of a node's cores; None if their number is not known."""
        return None if self.cpus_per_node is None else max(1, self.cpus_per_node // tasks_per_node)


def site_names() -> list[str]:
    """The profiles that come with the program."""
    return sorted(path.stem for path in SITES.glob("*.yaml"))


def load_site(name: str) -> Site:
    """A profile by its name, or by the path of a file of the user's.

    Raises:
        ValueError: there is none of this name, or something in it is not understood.
    """
    path = Path(name) if "/" in name or name.endswith(".yaml") else SITES / f"{name}.yaml"
    if not path.is_file():
        near = get_close_matches(name, site_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--site {name}: {hint}give one of {', '.join(site_names())}, or the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _Reader(path).site(path.stem, content)


class _Reader:
    """Checks what a profile says, and names the file in every complaint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def site(self, name: str, content: object) -> Site:
        values = self._mapping(content, "a profile")
        known = {"account" if item.name == "account_required" else item.name for item in fields(Site)} - {"name"}
        self._no_others(values, known, "")
        if values.get("account", "optional") not in ("required", "optional"):
            raise ValueError(f"{self._path}: account: {values['account']!r}; give required or optional")
        if values.get("gpu_request", "gres") not in GPU_REQUESTS:
            choices = ", ".join(GPU_REQUESTS)
            raise ValueError(f"{self._path}: gpu_request: {values['gpu_request']!r}; give one of {choices}")
        return Site(
            name=name,
            description=self._text(values.get("description"), "description"),
            partition=None if values.get("partition") is None else self._text(values["partition"], "partition"),
            account_required=values.get("account") == "required",
            gpus_per_node=self._count(values, "gpus_per_node"),
            cpus_per_node=self._count(values, "cpus_per_node"),
            gpu_request=values.get("gpu_request", "gres"),
            network_gbit_s=self._count(values, "network_gbit_s"),
            node_local=tuple(self._text(path, "node_local") for path in self._list(values, "node_local")),
            setup=self._settings(values, "setup", "line"),
            sbatch_options=self._options(values, "sbatch_options"),
            srun_options=self._options(values, "srun_options"),
            environment=self._environment(values),
        )

    def _environment(self, values: Mapping[str, Any]) -> dict[str, Setting]:
        found = {}
        for name, entry in self._mapping(values.get("environment") or {}, "environment").items():
            if not _VARIABLE.fullmatch(str(name)):
                raise ValueError(f"{self._path}: environment: {name!r} is no name of a variable")
            found[str(name)] = self._setting(entry, "value", f"environment: {name}")
        return found

    def _options(self, values: Mapping[str, Any], key: str) -> tuple[Setting, ...]:
        settings = self._settings(values, key, "option")
        for setting in settings:
            if not setting.text.startswith("-"):
                raise ValueError(f"{self._path}: {key}: {setting.text!r} is no option: it begins with -")
        return settings

    def _settings(self, values: Mapping[str, Any], key: str, what: str) -> tuple[Setting, ...]:
        return tuple(self._setting(entry, what, key) for entry in self._list(values, key))

    def _setting(self, entry: object, what: str, where: str) -> Setting:
        setting = self._mapping(entry, where)
        self._no_others(setting, {what, "why"}, f"{where}: ")
        missing = [key for key in (what, "why") if setting.get(key) in (None, "")]
        if missing:
            raise ValueError(f"{self._path}: {where}: no {' and no '.join(missing)}; every setting has a reason")
        return Setting(self._text(setting[what], where), " ".join(self._text(setting["why"], where).split()))

    def _no_others(self, values: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{self._path}: {where}unknown key {key!r}: {hint}Known: {', '.join(sorted(known))}")

    def _mapping(self, value: object, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{self._path}: {where}: {value!r}; give keys and values")
        return value

    def _list(self, values: Mapping[str, Any], key: str) -> Sequence[Any]:
        value = values.get(key) or []
        if not isinstance(value, list):
            raise ValueError(f"{self._path}: {key}: {value!r}; give a list")
        return value

    def _count(self, values: Mapping[str, Any], key: str) -> int | None:
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{self._path}: {key}: {value!r}; give a whole number above 0")
        return value

    def _text(self, value: object, where: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or "\n" in str(value).strip():
            raise ValueError(
                f"{self._path}: {where}: {value!r}; give one line of text (in quotes, if it is a word like yes or off)"
            )
        return str(value).strip()
