"""Optimizer state of OpenCLIP's checkpoints finds its parameters, whatever the groups on either side."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.factory import create_model
from tests.models.tiny import CONVNEXT, RESNET, TIMM_VIT, model_cfg, open_clip_model, tiny_model, write_model_file
from training.checkpoint.beta2 import carry_beta2
from training.checkpoint.export import read_epoch_file
from training.checkpoint.foreign_optimizer import declared_undecayed, load_foreign_optimizer, name_state
from training.config import OptimConfig
from training.optim.optimizer import build_optimizer
from training.optim.param_groups import build_param_groups

OPTIM = OptimConfig(lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6, wd=0.0)
MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "custom_text": {"custom_text": True},
    "resnet": {"vision": RESNET},
    "convnext": {"vision": CONVNEXT},
    "timm_vit": {"vision": TIMM_VIT},
}
# Its data parallelism names a device to torch, which on the CPU must not be.
OPEN_CLIP = """
import sys, open_clip, torch
parallel = torch.nn.parallel.DistributedDataParallel
torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **settings: parallel(model, **settings)
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


def _train_with_open_clip(directory: Path, *, world_size: int) -> Path:
    """Two epochs of one step each by open_clip_train itself; returns the directory of its checkpoints."""
    write_model_file(directory, "tiny_for_open_clip", text={"vocab_size": 49408, "context_length": 77})
    line = (
        "--dataset-type synthetic --batch-size 2 --epochs 2 --model tiny_for_open_clip --device cpu --precision fp32 "
        f"--workers 0 --train-num-samples {2 * world_size} --lr 1e-2 --lr-scheduler const --warmup 1 --wd 0 "
        f"--eps 1e-6 --beta2 0.98 --dist-backend gloo --local-loss --gather-with-grad --name r --logs {directory}/logs"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-c", OPEN_CLIP, f"{directory}/tiny_for_open_clip.json", *line.split()]
    ranks = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0] * world_size
    return directory / "logs/r/checkpoints"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_of_open_clip_3_3_0_brings_every_moment_to_its_parameter(tmp_path: Path, world_size: int) -> None:
    """Its own last update tells which moments belong to which weights: no rule of ours is needed to judge."""
    checkpoints = _train_with_open_clip(tmp_path, world_size=world_size)
    raw = torch.load(checkpoints / "epoch_2.pt", weights_only=True)["state_dict"]
    assert all(name.startswith("module.") for name in raw) == (world_size > 1)
    before, after = (read_epoch_file(str(checkpoints / f"epoch_{epoch}.pt")) for epoch in (1, 2))
    model = create_model(str(tmp_path / "tiny_for_open_clip.json")).model
    optimizer = build_optimizer(model, OPTIM)
    assert after.optimizer is not None
    load_foreign_optimizer(optimizer, model, after.optimizer, weights=list(after.state_dict), path="epoch_2.pt")
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 2
        mean, square = state["exp_avg"] / (1 - 0.9**2), state["exp_avg_sq"] / (1 - 0.98**2)
        expected = before.state_dict[name] - 1e-2 * mean / (square.sqrt() + 1e-6)
        torch.testing.assert_close(after.state_dict[name], expected, rtol=0, atol=2e-6, msg=name)


def _groups_of_3_3_0(named: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """open_clip_train 3.3.0, main.py, lines 335-351."""
    undecayed: Callable[[str, Tensor], bool] = lambda n, p: (  # noqa: E731
        p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    )
    named = list(named)
    return [
        {"params": [p for n, p in named if undecayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not undecayed(n, p)], "weight_decay": 0.2},
    ]


def _groups_of_head(model: nn.Module) -> list[dict[str, Any]]:
    """As OpenCLIP's main branch groups: declared names of all modules, groups in the order they are met, with names."""
    declared = declared_undecayed(model)
    groups: dict[bool, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim <= 1 or name in declared
        group = {"params": [], "weight_decay": 0.0 if spared else 0.2, "group_name": "no_wd" if spared else "wd"}
        groups.setdefault(spared, group)["params"].append(parameter)
    return list(groups.values())


def _stepped(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict after one step; parameter number i of the model has the gradient i + 1."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimizer.step()
    return optimizer.state_dict()


def _check_moments(model: nn.Module, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    parameters = dict(model.named_parameters())
    for index, name in enumerate(names):
        moment = optimizer.state[parameters[name]]["exp_avg"]
        torch.testing.assert_close(moment, torch.full_like(moment, 0.1 * (index + 1.0)), msg=name)


@pytest.mark.parametrize("layout", ["3.3.0", "HEAD"])
@pytest.mark.parametrize("kind", MODELS)
def test_groups_of_both_versions_are_understood_for_every_kind_of_model(kind: str, layout: str) -> None:
    theirs, ours = open_clip_model(model_cfg(**MODELS[kind])), tiny_model(**MODELS[kind])
    names = [name for name, _ in theirs.named_parameters()]
    groups = _groups_of_3_3_0(theirs.named_parameters()) if layout == "3.3.0" else _groups_of_head(theirs)
    saved = _stepped(theirs, groups)
    assert sum(len(group["params"]) for group in saved["param_groups"]) == len(names)
    optimizer = build_optimizer(ours, OPTIM)
    load_foreign_optimizer(optimizer, ours, saved, weights=list(theirs.state_dict()), path="epoch_1.pt")
    _check_moments(ours, optimizer, names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_the_two_versions_do_group_a_vit_differently() -> None:
    model = open_clip_model(model_cfg())
    sizes = [[len(g["params"]) for g in groups] for groups in (
        _groups_of_3_3_0(model.named_parameters()), _groups_of_head(model)
    )]  # fmt: skip
    assert sizes[1][0] == sizes[0][0] + 2  # the two positional embeddings


def test_our_own_exports_with_other_exclusions_name_their_parameters() -> None:
    ours = tiny_model()
    names = [name for name, _ in ours.named_parameters()]
    groups = build_param_groups(ours.named_parameters(), weight_decay=0.2, exclude=["*positional_embedding"])
    saved = _stepped(ours, groups)
    optimizer = build_optimizer(ours, OPTIM)
    load_foreign_optimizer(optimizer, ours, saved, path="epoch_1.pt")
    _check_moments(ours, optimizer, names)


def test_a_state_that_fsdp_keyed_by_name_is_understood() -> None:
    """HEAD's FSDP gives scalar parameters a dimension, and keys the state by name."""
    theirs, ours = open_clip_model(model_cfg()), tiny_model()
    names = [name for name, _ in theirs.named_parameters()]
    saved = _stepped(theirs, [{"params": list(theirs.parameters())}])
    saved["state"] = {f"module.{names[index]}": values for index, values in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(saved["state"])
    scale = saved["state"]["module.logit_scale"]
    scale |= {key: scale[key].reshape(1) for key in ("exp_avg", "exp_avg_sq")}
    optimizer = build_optimizer(ours, OPTIM)
    load_foreign_optimizer(optimizer, ours, saved, path="epoch_1.pt")
    _check_moments(ours, optimizer, names)
    assert optimizer.state[ours.logit_scale]["exp_avg"].shape == ()


def test_second_moments_are_carried_to_the_beta2_of_this_run() -> None:
    theirs, ours = open_clip_model(model_cfg()), tiny_model()
    saved = _stepped(theirs, _groups_of_3_3_0(theirs.named_parameters()))
    optimizer = build_optimizer(ours, OptimConfig(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-6))
    load_foreign_optimizer(optimizer, ours, saved, path="epoch_1.pt")
    first = next(ours.parameters())
    torch.testing.assert_close(optimizer.state[first]["exp_avg_sq"], torch.full_like(first, 0.05))  # (1 - beta2) * 1
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_optimizers_without_betas_are_left_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    carry_beta2(optimizer, [{"betas": (0.9, 0.98)}])
    assert "betas" not in optimizer.param_groups[0]


def _saved_vit() -> tuple[dict[str, Any], Mapping[str, tuple[int, ...]]]:
    theirs = open_clip_model(model_cfg())
    shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    return _stepped(theirs, _groups_of_3_3_0(theirs.named_parameters())), shapes


def test_what_does_not_fit_is_refused_with_the_cause() -> None:
    saved, shapes = _saved_vit()
    first, *_ = shapes
    with pytest.raises(ValueError, match=r"'x.pt' holds no optimizer state"):
        name_state({"state": {}}, shapes, path="x.pt")
    fewer = {name: shape for name, shape in shapes.items() if name != first}
    with pytest.raises(
        ValueError, match=rf"{len(shapes)} parameters were trained there, {len(fewer)} are here.*--lock"
    ):
        name_state(saved, fewer, path="x.pt")
    with pytest.raises(ValueError, match="neither 3.3.0's, nor HEAD's, nor timm's.*--wd-exclude"):
        name_state(saved, {**shapes, "text_projection": (5, 5)}, path="x.pt")
    saved["param_groups"] = [{**group, "lr_scale": 0.5, "group_name": "g"} for group in saved["param_groups"]][::-1]
    with pytest.raises(ValueError, match="layer decay"):
        name_state(saved, shapes, path="x.pt")


def test_named_state_of_other_parameters_is_refused() -> None:
    saved, shapes = _saved_vit()
    names = list(shapes)
    saved["param_groups"] = [{"params": list(range(len(names))), "param_names": names}]
    with pytest.raises(ValueError, match=r"1 are not trained here \(first 'logit_scale'\); 1 trained .*'other'"):
        name_state(saved, {"other": (), **{n: s for n, s in shapes.items() if n != "logit_scale"}}, path="x.pt")
    with pytest.raises(ValueError, match="'text_projection' in another shape than"):
        name_state(saved, {**shapes, "text_projection": (5, 5)}, path="x.pt")


def test_the_state_of_another_optimizer_is_refused() -> None:
    ours = tiny_model()
    lion = build_optimizer(ours, OptimConfig(opt="timm/lion", lr=1e-3, wd=0.2))
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    lion.step()
    with pytest.raises(ValueError, match=r"was trained with another optimizer: its state is exp_avg, and AdamW needs"):
        load_foreign_optimizer(build_optimizer(ours, OPTIM), ours, lion.state_dict(), path="x.pt")


def test_old_step_counts_that_are_plain_numbers_become_tensors() -> None:
    saved, shapes = _saved_vit()
    saved["state"][0]["step"] = 7
    state = name_state(saved, shapes, path="x.pt")
    assert 7.0 in [values["step"] for values in state.values()]
    assert json.loads(json.dumps(sorted(state))) == sorted(shapes)
