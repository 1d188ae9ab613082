"""What a number was measured on: command, commit, hardware, versions."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.open_clip_checkout import describe_open_clip

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")


def describe_run(device: torch.device) -> dict[str, object]:
    """Everything needed to judge a measurement, or to repeat it."""
    return {
        "command": shlex.join(("python", *map(_without_folders, sys.orig_argv[1:]))),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "hardware": _hardware(device),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: _version(name) for name in DISTRIBUTIONS},
        "open_clip": describe_open_clip(),
    }


def model_name(model: str) -> str:
    """A model by its name; of a configuration's file only the name that it gives."""
    return Path(model).stem if model.endswith(".json") else model


def device_label(device: torch.device) -> str:
    """Which GPU; of a CPU only that."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return slug(torch.cuda.get_device_name(device)) if is_there else device.type


def slug(words: str) -> str:
    """As part of a file name: ``--text-packing=off`` -> ``text-packing-off``."""
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def _without_folders(word: str) -> str:
    """A word of a command line; of an absolute path only the name: folders of a machine say nothing elsewhere."""
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _hardware(device: torch.device) -> dict[str, object]:
    hardware: dict[str, object] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("--query-gpu=driver_version,clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader")
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_state": _output("nvidia-smi", *query),
        }
    return hardware


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or no repository."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
