"""The structure of the source, checked: layers, style, types, and who may call what."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("training", "models", "slurm", "configs")
WITHOUT_TORCH = ("training.cli", "training.config", "models.config", "training.commands.main", "slurm", "configs")


def run_tool(*arguments: str) -> None:
    """Run a tool in the root of the source tree; what it prints is the message of a failure."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"


def imported_modules(source: str) -> Iterator[str]:
    """Every module that a source text imports, at any depth, also as ``torch.distributed`` written out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def uses_torch_distributed(source: str) -> bool:
    return any(f"{name}.".startswith("torch.distributed.") for name in imported_modules(source))


def test_imports_only_go_down():
    run_tool(sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")


def test_every_module_of_training_has_its_layer():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name for layer in contracts[0]["layers"] for name in layer.split(" : ")}
    parts = {
        f"training.{path.stem}"
        for path in (ROOT / "training").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    }
    assert parts == {name for name in placed if name.startswith("training.")}


def test_ruff_finds_nothing():
    run_tool(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_strict_mypy_finds_nothing():
    run_tool(sys.executable, "-m", "mypy")


def test_only_training_distributed_uses_torch_distributed():
    offenders = [
        str(path.relative_to(ROOT))
        for package in SOURCE
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.is_relative_to(ROOT / "training" / "distributed") and uses_torch_distributed(path.read_text())
    ]
    assert not offenders, f"torch.distributed outside training/distributed: {', '.join(offenders)}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "def f():\n    from torch.distributed.nn import all_gather",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_every_way_to_reach_torch_distributed_is_seen(source):
    assert uses_torch_distributed(source)


@pytest.mark.parametrize("source", ["import torch", "from training import distributed", "torch.ones(2)"])
def test_other_imports_are_not_mistaken_for_torch_distributed(source):
    assert not uses_torch_distributed(source)


def test_a_configuration_is_read_without_importing_torch():
    program = f"import sys, {', '.join(WITHOUT_TORCH)}\nsys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    run_tool(sys.executable, "-c", program)
