"""Connects a run with its mirror: what ``--remote-sync`` and ``--resume URL`` mean at the start and at the end.

claimed -> bring_back: history, newest checkpoint -> resume -> open_mirror, checked -> train -> finish
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.mirror import Mirror, start_errors
from training.checkpoint.mirror_fetch import CHECKPOINTS, RemoteRun, fetch_newest, fetch_url, parse_place
from training.checkpoint.mirror_history import fetch_history
from training.checkpoint.mirror_store import RemoteStore, open_store
from training.config import CheckpointConfig

logger = logging.getLogger(__name__)


def bring_back(config: CheckpointConfig, *, run: Path, name: str, generation: int = 0) -> list[str]:
    """What the mirror has and the run directory lacks, for a run that goes on. On rank 0, before the log is opened.

    The directory has to be claimed. If the newest whole checkpoint is here, it is not downloaded. If another directory
    has gone on with the run, its history and its checkpoints count. A checkpoint of the mirror that ``--resume`` names
    is fetched by ``fetch_resume``.

    Returns:
        What to write into the log once it is open.

    Raises:
        ValueError: not a URL that can be used. RuntimeError: it cannot be read now.
        DamagedCheckpoint: there are checkpoints, and none is whole at either place.
    """
    if config.remote_sync is None:
        return []
    remote = RemoteRun(_store(config, name))
    if not _goes_on(config, remote.store):
        return []
    before = set((run / CHECKPOINTS).glob("step_*"))
    newest = None
    try:
        with start_errors("--remote-sync"):
            history = fetch_history(remote, run)
            if config.resume == "latest":
                newest = fetch_newest(remote, run / CHECKPOINTS, generation=generation)
    except DamagedCheckpoint as damage:
        if not config.allow_restart_from_zero:
            raise
        logger.warning("%s", damage)
    notices = []
    if history.fetched:
        notices.append(f"Fetched {len(history.fetched)} files of the run's history from {remote.store.url}.")
    if history.aside is not None:
        notices.append(f"The run went on elsewhere since: what was here is in {history.aside}.")
    if newest is not None and newest not in before:
        notices.append(f"Fetched {newest.name} from {remote.store.url}.")
    return notices


def is_remote_run(resume: str) -> bool:
    """Whether ``--resume`` names a mirrored run or checkpoint, and not a single ``.pt`` file."""
    return "://" in resume and not resume.endswith(".pt")


def fetch_resume(config: CheckpointConfig, *, checkpoints: Path | None, generation: int = 0) -> str:
    """The local directory of the checkpoint that ``--resume URL`` names. On rank 0.

    Raises:
        ValueError: there is no run directory to fetch into, or nothing at the URL. DamagedCheckpoint: nothing whole.
        RuntimeError: it cannot be read now.
    """
    assert config.resume is not None
    if checkpoints is None:
        raise ValueError("--resume URL with --logs none: there is no run directory to fetch the checkpoint into.")
    checkpoints.mkdir(parents=True, exist_ok=True)
    protocol = config.remote_sync_protocol if config.remote_sync is not None else None
    with start_errors("--resume"):
        return str(fetch_url(config.resume, checkpoints, protocol=protocol, generation=generation))


def open_mirror(
    config: CheckpointConfig, *, run: Path, name: str, fence: Callable[[], None] | None = None
) -> Mirror | None:
    """The mirror of a run, checked but not started; None without ``--remote-sync``. On rank 0, before the first step.

    Raises:
        ValueError: it cannot be written, or holds another run of this name. RuntimeError: the storage does not work.
    """
    if config.remote_sync is None:
        return None
    store = _store(config, name)
    mirror = Mirror(
        run,
        store,
        every_s=config.remote_sync_frequency,
        keep=max(2, config.keep_checkpoints),
        keep_every=config.keep_every_n_steps,
        fence=fence,
    )
    # What is here was fetched from there, or has been there before: --resume latest never overlooks a newer one.
    mirror.check(continues=_goes_on(config, store))
    return mirror


def _goes_on(config: CheckpointConfig, store: RemoteStore) -> bool:
    """Whether the run continues what is mirrored at its own place."""
    resume = config.resume or ""
    return resume == "latest" or parse_place(resume).run == store.url


def _store(config: CheckpointConfig, name: str) -> RemoteStore:
    assert config.remote_sync is not None
    return open_store(f"{config.remote_sync.rstrip('/')}/{name}", protocol=config.remote_sync_protocol)
