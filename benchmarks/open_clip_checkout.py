"""Which OpenCLIP is measured: the installed one, or that of ``--open-clip-path CHECKOUT``; never the wrong one.

Our own code imports open_clip, too, so by the time a command line is read it is loaded. A program that is asked for a
checkout therefore starts once more, with the checkout first on ``PYTHONPATH``; its children find it there as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def use_open_clip_checkout(path: Path | None, *, may_restart: bool) -> None:
    """Makes sure that open_clip comes from a checkout: starts this program anew, or returns because it does.

    Args:
        path: the checkout; None takes what is installed.
        may_restart: this process is a program of its own, started with its command line.

    Raises:
        ValueError: the checkout has no open_clip.
        RuntimeError: another open_clip is loaded.
    """
    if path is None:
        return
    folder = find_package(path)
    paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if may_restart and str(folder) not in paths:
        sys.stdout.flush()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *paths])}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    loaded = Path(str(import_module("open_clip").__file__)).resolve()
    if not loaded.is_relative_to(folder):
        raise RuntimeError(
            f"open_clip is that of {loaded.parent}, not of --open-clip-path {path}: start the program by its command "
            f"line, with PYTHONPATH={folder}"
        )


def find_package(path: Path) -> Path:
    """The folder that is to be imported from; both layouts (``src/`` or flat) are found.

    Raises:
        ValueError: there is none.
    """
    for folder in (path / "src", path):
        if (folder / "open_clip" / "__init__.py").exists():
            return folder.resolve()
    raise ValueError(f"no open_clip package under {path}: pass --open-clip-path CHECKOUT, the root of its repository")


def describe_open_clip() -> dict[str, object] | None:
    """The OpenCLIP that is loaded: its own version, the commit of its checkout; None where none is."""
    module = sys.modules.get("open_clip")
    if module is None or module.__file__ is None:
        return None
    folder = Path(module.__file__).parent
    own = str(module.__version__)
    # Only of a repository that has this very file: an environment may lie inside of another one.
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    return {
        "version": own,
        "installed": own == _installed_version() and folder.parent.name == "site-packages",
        "commit": _git(folder, "rev-parse", "HEAD") if tracked else None,
        "uncommitted_changes": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")) if tracked else None,
    }


def open_clip_label(run: dict[str, object]) -> str:
    """Of a result, for tables and file names: ``3.3.0``, or ``4.0.0.dev0-1a2b3c4d5`` of a checkout."""
    found = run.get("open_clip")
    if not isinstance(found, dict):
        versions = run.get("versions")
        return str(versions.get("open_clip_torch", "?")) if isinstance(versions, dict) else "?"
    commit = f"-{found['commit'][:9]}" if found.get("commit") else ""
    return f"{found['version']}{commit or ('' if found.get('installed', True) else '-checkout')}"


def _installed_version() -> str | None:
    try:
        return version("open_clip_torch")
    except PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(("git", "-C", folder, *words), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
