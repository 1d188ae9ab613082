"""What is installed is enough: the built wheel imports and trains from an empty directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("training", "models", "slurm", "configs")
TRAIN = (
    *("--dataset-type=synthetic", "--train-num-samples=16", "--batch-size=4", "--epochs=1", "--workers=0"),
    *("--model=demo-vit", "--precision=fp32", "--device=cpu", "--warmup=1", "--logs=logs", "--name=run"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: building in place would pack what an earlier build left under build/."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source))
    subprocess.run((sys.executable, "-m", "pip", *build), check=True)
    return next(target.glob("clipyard-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel in it."""
    target = tmp_path_factory.mktemp("installed")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    subprocess.run((sys.executable, "-m", "pip", *install), check=True)
    return target


def run_installed(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in ``directory``, finding our packages in ``installed`` and nowhere in the source tree."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = (sys.executable, *arguments)
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_packs_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    kept = (".py", ".json", ".yaml", ".sbatch", ".sh", ".typed")
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in kept]
    missing = sorted({str(path.relative_to(ROOT)) for path in files} - packed)
    assert not missing, f"in the source tree and not in the wheel: {missing}"


def test_the_wheel_packs_nothing_but_our_packages(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_an_installed_copy_resolves_its_model_configs(installed, tmp_path):
    program = (
        "import configs, models.config, slurm, training.main, training.commands.main as main\n"
        "print(models.config.load_model_config('demo-vit'))\n"
        "print(configs.__file__)"
    )
    done = run_installed(installed, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout


def test_an_installed_copy_trains_from_an_empty_directory(installed, tmp_path):
    done = run_installed(installed, tmp_path, "-m", "training.main", *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt").is_file()
