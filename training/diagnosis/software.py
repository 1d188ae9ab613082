"""Tells which software a node would train with: versions, a digest of the code, and modules that are missing."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import sys
from importlib import metadata, util
from pathlib import Path

import torch

from training.config import Config
from training.diagnosis.findings import Finding, bad, ok
from training.validation import report_targets

_PACKAGES = ("training", "models", "slurm", "configs")
_ALWAYS = {
    "numpy": "numpy",
    "PIL": "pillow",
    "yaml": "PyYAML",
    "safetensors": "safetensors",
    "torchvision": "torchvision",
}


def read_versions() -> dict[str, str]:
    """What all nodes of a job must have alike."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "code": code_digest(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    return versions


def code_digest() -> str:
    """Of our packages as they lie here: a node with an old copy trains something else."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def needed_modules(config: Config) -> dict[str, str]:
    """Module -> the name it is installed by, for what a configuration uses."""
    needed = dict(_ALWAYS)
    data, model = config.data, config.model.model
    urls = " ".join(filter(None, (data.train_data, data.train_data_manifest, data.val_data)))
    if any(scheme in urls for scheme in ("s3://", "http://", "https://")):
        needed["obstore"] = "obstore"
    if any(f"{scheme}://" in urls for scheme in ("gs", "gcs", "az", "abfs", "hf")):
        needed["fsspec"] = "fsspec"
    if "convnext" in model.lower() or "timm" in config.optim.opt:
        needed["timm"] = "timm"
    if model.startswith("hf-hub:") or "roberta" in model.lower():
        needed["transformers"] = "transformers"
    targets = report_targets(config.logging.report_to)
    needed |= {name: name for name in ("wandb", "tensorboard") if name in targets}
    return needed


def look_for_modules(needed: dict[str, str], *, load: bool) -> Finding:
    """Whether every module is there; with ``load`` also whether it can be loaded, which takes seconds.

    Args:
        needed: module -> the name it is installed by.
    """
    missing = {module: name for module, name in needed.items() if util.find_spec(module) is None}
    if missing:
        remedy = f"{sys.executable} -m pip install {' '.join(missing.values())}"
        return bad("modules", f"{', '.join(missing)} missing in {sys.prefix}: {remedy}", shared=True)
    for module in needed if load else ():
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            return bad("modules", f"{module} cannot be loaded ({type(error).__name__}: {error})", shared=True)
    return ok("modules", f"{len(needed)} {'loaded' if load else 'found'}, {_installed_torch()}")


def _installed_torch() -> str:
    try:
        return f"torch {metadata.version('torch')} for {os.path.basename(sys.executable)} {platform.python_version()}"
    except metadata.PackageNotFoundError:  # a build of its own
        return f"torch {torch.__version__}"
