"""Names a run, lays out its directory, and writes the settings into it.

    LOGS/NAME/
        out.log  params.txt  config.yaml  metrics.jsonl  events.jsonl  telemetry.jsonl
        checkpoints/   epoch_N.pt, epoch_latest.pt, results.jsonl
        tensorboard/
        code/          with --copy-codebase
        leases/        which start of the run owns the directory
        hangs/         where every thread stood when the run hung

The layout and the default name are OpenCLIP's, so that scripts that read its runs read these.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from training.cli import config_values, load_config
from training.config import Config
from training.flags import FLAGS, Verdict
from training.validation import logs_disabled, report_targets

logger = logging.getLogger(__name__)

_DATE_FORMAT = "%Y_%m_%d-%H_%M_%S"
_DATE_PATTERN = r"\d{4}_\d{2}_\d{2}-\d{2}_\d{2}_\d{2}"


STARTS_FILE = "starts.jsonl"
EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes."""

    root: Path
    out_log: Path
    params_txt: Path
    config_yaml: Path
    checkpoints: Path
    tensorboard: Path
    code: Path
    metrics_jsonl: Path
    results_jsonl: Path
    trace: Path
    starts_jsonl: Path
    events_jsonl: Path
    telemetry_jsonl: Path
    leases: Path
    hangs: Path


def default_name(config: Config, *, date: datetime) -> str:
    """Date, model, learning rate, batch size, workers and precision, as OpenCLIP spells them."""
    return f"{date.strftime(_DATE_FORMAT)}-{_name_without_date(config)}"


def choose_run_name(config: Config, *, date: datetime) -> str:
    """The run's name: as given, or that of the run to resume, or a new one with the date.

    Without ``--name`` a name differs every second, so ``--resume latest`` looks for the newest run in ``--logs`` that
    the same command line started. It reads files: call it on one rank, and broadcast.
    """
    if config.logging.name is not None:
        return config.logging.name
    if config.checkpoint.resume == "latest" and not logs_disabled(config.logging.logs):
        resumed = _newest_run_of(config)
        if resumed is not None:
            return resumed
    return default_name(config, date=date)


def run_paths(config: Config, *, name: str, rank: int = 0) -> RunPaths | None:
    """The layout of a run's directory, or None where ``--logs none`` asks for no files."""
    if logs_disabled(config.logging.logs):
        return None
    root = Path(config.logging.logs) / name
    checkpoints = root / "checkpoints"
    return RunPaths(
        root=root,
        out_log=root / (f"out-{rank}" if config.logging.log_local else "out.log"),
        params_txt=root / "params.txt",
        config_yaml=root / "config.yaml",
        checkpoints=checkpoints,
        tensorboard=root / "tensorboard",
        code=root / "code",
        metrics_jsonl=root / "metrics.jsonl",
        # OpenCLIP's place for it.
        results_jsonl=checkpoints / "results.jsonl",
        trace=root / "trace",
        starts_jsonl=root / STARTS_FILE,
        events_jsonl=root / EVENTS_FILE,
        telemetry_jsonl=root / "telemetry.jsonl",
        leases=root / "leases",
        hangs=root / "hangs",
    )


def claim_run_directory(paths: RunPaths, *, config: Config) -> None:
    """Makes the directory of a run, on the main rank, before anything else of the run is started.

    Raises:
        ValueError: the name is taken by another run, or nothing can be written there.
    """
    # Checkpoints alone are a run as well: starting anew beside them would replace them one by one. A log alone is not:
    # a start that was refused leaves one, and its corrected line must not be refused for that.
    saved = [*paths.checkpoints.glob("step_*"), *paths.checkpoints.glob("epoch_*.pt")]
    taken = [path for path in (paths.params_txt, paths.results_jsonl, *saved) if path.exists()]
    if taken and config.checkpoint.resume != "latest":
        raise ValueError(
            f"a run of the name {paths.root.name} exists already ({taken[0]}): "
            "pass --resume latest to continue it, or another --name."
        )
    directories = [paths.checkpoints]
    if "tensorboard" in report_targets(config.logging.report_to):
        directories.append(paths.tensorboard)
    try:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell (quota, read-only mounts, root): only writing does.
        with tempfile.TemporaryFile(dir=paths.root) as probe:
            probe.write(b"0")
    except OSError as error:
        raise ValueError(
            f"the run directory {paths.root} cannot be written ({error.strerror}): "
            "pass --logs DIR with a directory that can, or --logs none."
        ) from error


def params_text(config: Config, *, paths: RunPaths | None, facts: Mapping[str, object]) -> str:
    """``params.txt``: one ``name: value`` line per setting and per fact of this start, sorted by name.

    Args:
        facts: what only a running process knows, under OpenCLIP's names: device, rank, local_rank, world_size, name,
            and resume if it was looked up. They win over settings of the same name.
    """
    lines = _openclip_settings(config) | _derived(config, paths) | dict(facts)
    if "world_size" in facts:
        lines["distributed"] = facts["world_size"] != 1
    return "".join(f"{name}: {lines[name]}\n" for name in sorted(lines))


def _openclip_settings(config: Config) -> dict[str, object]:
    """Every flag of 3.3.0, supported or not, and every other supported one, as OpenCLIP would hold it."""
    unsupported = (flag for flag in FLAGS if flag.verdict is not Verdict.SUPPORTED and flag.origin == "3.3.0")
    settings = {flag.field_name: flag.off for flag in unsupported} | config_values(config)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    size = config.model.force_image_size
    if size is not None and len(size) == 1:
        settings["force_image_size"] = size[0]
    return settings


def _derived(config: Config, paths: RunPaths | None) -> dict[str, object]:
    targets = report_targets(config.logging.report_to)
    tensorboard = "tensorboard" in targets
    return {
        "checkpoint_path": paths.checkpoints if paths else None,
        "distill": False,
        "log_level": logging.DEBUG if config.logging.debug else logging.INFO,
        "log_path": paths.out_log if paths else None,
        "tensorboard": tensorboard,
        "tensorboard_path": paths.tensorboard if paths and tensorboard else "",
        "wandb": "wandb" in targets,
    }


def _name_without_date(config: Config) -> str:
    return "-".join(
        [
            f"model_{config.model.model.replace('/', '-')}",
            f"lr_{config.optim.lr}",
            f"b_{config.data.batch_size}",
            f"j_{config.data.workers}",
            f"p_{config.engine.precision}",
        ]
    )


def _newest_run_of(config: Config) -> str | None:
    logs = Path(config.logging.logs)
    pattern = re.compile(f"{_DATE_PATTERN}-{re.escape(_name_without_date(config))}")
    try:
        names = sorted(entry.name for entry in logs.iterdir() if pattern.fullmatch(entry.name))
    except OSError:
        # Not there yet; or not readable, which claiming the directory reports.
        return None
    for name in reversed(names):
        if _was_started_by(config, logs / name / "config.yaml"):
            return name
        logger.warning("%s has other settings, so it is not continued: pass --name %s to do so.", logs / name, name)
    return None


def _was_started_by(config: Config, config_yaml: Path) -> bool:
    """Whether a run directory's record holds the same settings; how it was started or named does not count."""
    try:
        recorded = load_config(config_yaml)
    except ValueError:
        return False
    return _identity(recorded) == _identity(config)


def _identity(config: Config) -> Config:
    return replace(
        config,
        checkpoint=replace(config.checkpoint, resume=None),
        logging=replace(config.logging, name=None),
    )
