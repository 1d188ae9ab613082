"""Parameter groups and optimizers are OpenCLIP's; AdamW is fused."""

from __future__ import annotations

import copy

import open_clip
import pytest
import timm.optim
import torch
from torch import nn

from tests.tiny_clip import tiny_batch, tiny_clip
from training.config import OptimConfig
from training.optim import optimizer as optimizer_module
from training.optim.optimizer import build_optimizer
from training.optim.param_groups import build_param_groups

ADAMW = OptimConfig(lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, wd=0.2)


@pytest.fixture(scope="module")
def open_clip_model():
    """Shapes of the real thing without its weights: class names and parameter names decide the groups."""
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"), init_logit_bias=-10.0)


def reference_groups(model: nn.Module) -> list[list[str]]:
    """The rule of open_clip_train 3.3.0, main.py lines 335-342."""

    def excluded(name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[name for name, parameter in named if excluded(name, parameter) is no_decay] for no_decay in (True, False)]


def test_groups_are_open_clips_in_its_order(open_clip_model):
    groups = build_param_groups(open_clip_model.named_parameters(), weight_decay=0.2)
    assert [group["param_names"] for group in groups] == reference_groups(open_clip_model)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    # Facts of 3.3.0: 200 parameters without decay (and the bias of this model); positional embeddings are decayed.
    assert len(groups[0]["params"]) == 201
    assert {"positional_embedding", "visual.positional_embedding"} <= set(groups[1]["param_names"])
    names = dict(open_clip_model.named_parameters())
    for group in groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


def test_names_that_match_a_glob_are_not_decayed(open_clip_model):
    found = build_param_groups(open_clip_model.named_parameters(), weight_decay=0.2, exclude=["*positional_embedding"])
    assert len(found[0]["params"]) == 203


def test_a_glob_that_matches_nothing_is_refused(open_clip_model):
    with pytest.raises(ValueError, match="--wd-exclude positional matches no trained parameter.*whole name"):
        build_param_groups(open_clip_model.named_parameters(), weight_decay=0.2, exclude=["positional"])


def test_frozen_parameters_are_in_no_group_and_an_empty_group_stays():
    model = tiny_clip()
    model.requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    groups = build_optimizer(model, ADAMW).param_groups
    assert [group["param_names"] for group in groups] == [["logit_scale"], []]


def test_a_model_with_everything_frozen_is_refused():
    model = tiny_clip()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trained.*--lock-image or --lock-text"):
        build_optimizer(model, ADAMW)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(*tiny_batch(8)[:2])
        (output.logit_scale * output.image_features @ output.text_features.T).logsumexp((0, 1)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_adamw_is_fused_and_updates_like_open_clips():
    model, reference = tiny_clip(), tiny_clip()
    names = dict(reference.named_parameters())
    no_decay, decay = reference_groups(reference)
    plain = torch.optim.AdamW(
        [
            {"params": [names[name] for name in no_decay], "weight_decay": 0.0},
            {"params": [names[name] for name in decay], "weight_decay": 0.2},
        ],
        lr=1e-3,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    found = build_optimizer(model, ADAMW)
    assert all(group["fused"] for group in found.param_groups)
    torch.testing.assert_close(train(model, found), train(reference, plain), rtol=1e-6, atol=1e-7)


def test_the_state_of_an_optimizer_that_is_not_fused_loads_and_stays_fused():
    model = tiny_clip()
    source = build_optimizer(model, OptimConfig(**{**vars(ADAMW), "opt_kwargs": {"foreach": False}}))
    train(model, source)
    state = copy.deepcopy(source.state_dict())
    for group in state["param_groups"]:  # as OpenCLIP writes it
        del group["param_names"]
        group["fused"] = None
    twin = copy.deepcopy(model)
    target = build_optimizer(twin, ADAMW)
    target.load_state_dict(state)
    assert all(group["fused"] for group in target.param_groups)
    torch.testing.assert_close(train(twin, target), train(model, source), rtol=1e-6, atol=1e-7)


def test_adamw_falls_back_where_it_cannot_be_fused(monkeypatch):
    real = torch.optim.AdamW

    def without_fused(groups, **settings):
        if settings.get("fused"):
            raise RuntimeError("fused is not supported on this device")
        return real(groups, **settings)

    monkeypatch.setattr(optimizer_module.torch.optim, "AdamW", without_fused)
    assert not build_optimizer(tiny_clip(), ADAMW).defaults["fused"]


def test_opt_kwargs_reach_the_optimizer():
    config = OptimConfig(**{**vars(ADAMW), "opt_kwargs": {"amsgrad": True, "fused": False}})
    found = build_optimizer(tiny_clip(), config)
    assert (found.defaults["amsgrad"], found.defaults["fused"]) == (True, False)


def test_nadamw_decays_weights_apart_from_the_gradient():
    found = build_optimizer(tiny_clip(), OptimConfig(**{**vars(ADAMW), "opt": "nadamw"}))
    assert isinstance(found, torch.optim.NAdam)
    assert found.defaults["decoupled_weight_decay"]
    assert [group["weight_decay"] for group in found.param_groups] == [0.0, 0.2]


def test_timm_optimizers_are_built_as_open_clip_builds_them():
    model, twin = tiny_clip(), tiny_clip()
    found = build_optimizer(model, OptimConfig(opt="timm/lion", lr=1e-3, beta1=0.9, beta2=0.95, wd=0.1))
    reference = timm.optim.create_optimizer_v2(twin, "lion", lr=1e-3, weight_decay=0.1, eps=None, betas=(0.9, 0.95))
    assert type(found) is type(reference)
    torch.testing.assert_close(train(model, found), train(twin, reference), rtol=0, atol=0)
    with_momentum = build_optimizer(model, OptimConfig(opt="timm/sgd", lr=1e-3, momentum=0.5))
    assert with_momentum.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(opt="adamw", lr=1e-3, eps=1e-6), "--opt adamw needs --beta1, --beta2: give a value"),
        (OptimConfig(opt="adamx"), "--opt adamx: unknown; give one of adamw, stableadamw, nadamw, or timm/NAME"),
        (OptimConfig(opt="timm/lion", lr=1e-3, beta1=0.9), "--beta1 0.9 and --beta2 None: give both or neither"),
        (OptimConfig(opt="timm/no_such", lr=1e-3), r"--opt timm/no_such: .*list_optimizers"),
        (OptimConfig(opt="timm/lion", lr=1e-3, wd_exclude=("a",)), "--wd-exclude has no effect with --opt timm/lion"),
        (OptimConfig(**{**vars(ADAMW), "opt_kwargs": {"speed": 9}}), "--opt adamw refused its arguments .*speed"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(tiny_clip(), config)
