"""The profile of a step: every operation has one category, and gradients have that of what they are gradients of."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import profile_step, step_categories
from benchmarks.profile_step import Marked, main, summarize, table_of, tables_of_results
from benchmarks.scale_report import fill
from benchmarks.step_categories import CATEGORIES, Operation, categorize, read_operations
from tests.factories import write_tiny_model

TINY = ("--batch-size=2", "--device=cpu", "--steps=1", "--warmup-steps=1")


def test_no_operation_is_in_two_tables():
    listed = Counter(name for names in step_categories._NAMES.values() for name in names.split())
    assert [name for name, times in listed.items() if times > 1] == []
    assert set(step_categories.NAMES.values()) | {category for _, category in step_categories.SCOPES} < {*CATEGORIES}


def test_every_operation_of_every_arm_has_a_category(tmp_path):
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    assert main([*TINY, f"--model={write_tiny_model(tmp_path)}", f"--out={out}", f"--trace={trace}"]) == 0
    arms = json.loads(out.read_text())["arms"]
    for name, arm in arms.items():
        assert arm["other"] == [], name
        assert arm["categories"]["other"]["share"] < 0.05
        assert sum(part["share"] for part in arm["categories"].values()) == pytest.approx(1, abs=1e-3)
        for category in ("matrix products", "attention", "convolution", "optimizer", "loss"):
            assert arm["categories"][category]["ms"] > 0, (name, category)
        assert (tmp_path / f"trace_{name}.json").stat().st_size > 10_000
    # What packing and the tower's last block leave out is work of these two.
    assert arms["clipyard"]["operations"] != arms["clipyard_off"]["operations"]


def _categories(step, *, part: str) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        step()
    operations = read_operations(profiler.events(), on_device=False)
    return [categorize(operation) for operation in operations if part in operation.name]


def test_a_product_of_the_loss_is_loss_forward_and_backward_and_others_are_not():
    weight, data = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    loss = Marked(lambda features: (features @ features.T).square().sum())
    products = _categories(lambda: loss(data @ weight).backward(), part="aten::mm")
    assert Counter(products) == {"loss": 3, "matrix products": 3}


def test_a_step_of_the_backward_pass_belongs_where_its_forward_operation_does():
    image, kernel = torch.ones(1, 1, 4, 4, requires_grad=True), torch.ones(1, 1, 2, 2, requires_grad=True)

    def step() -> None:
        torch.nn.functional.conv2d(image, kernel).sum().backward()

    assert set(_categories(step, part="ConvolutionBackward0")) == {"convolution"}


def test_the_gradient_norm_and_the_update_are_the_optimizers():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], foreach=False)

    def step() -> None:
        parameter.grad = torch.ones(3)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0, foreach=True)
        optimizer.step()

    assert set(_categories(step, part="_foreach_norm") + _categories(step, part="sqrt")) == {"optimizer"}


@pytest.mark.parametrize(
    ("name", "kernel", "category"),
    [
        ("triton_poi_fused_gelu_0", "triton_poi_fused_gelu_0", "norm, pointwise"),
        ("triton_tem_fused_mm_3", "triton_tem_fused_mm_3", "matrix products"),
        ("a_new_operation", "sm90_xmma_fprop_implicit_gemm", "matrix products"),
        ("a_new_operation", "ncclDevKernel_AllReduce", "collectives"),
        ("a_new_operation", "a_new_kernel", "other"),
        ("autograd::engine::evaluate_function: c10d::allreduce_", "", "collectives"),
    ],
)
def test_what_no_table_knows_is_judged_by_its_kernels(name, kernel, category):
    assert categorize(Operation(name, (), kernel_names=(kernel,))) == category


def test_the_outermost_scope_decides():
    inside = Operation("aten::mm", ("clipyard::loss", "aten::scaled_dot_product_attention", "aten::matmul"))
    assert categorize(inside) == "loss"
    assert categorize(inside._replace(around=inside.around[1:])) == "attention"
    assert categorize(inside._replace(around=())) == "matrix products"


def test_times_are_per_step_and_shares_of_all_operations():
    operations = [Operation("aten::mm", (), time_us=3000.0), Operation("aten::add", (), time_us=1000.0, kernels=3)]
    result = summarize(operations, steps=2, wall_ms=5.0)
    assert result["categories"]["matrix products"] == {"ms": 1.5, "share": 0.75, "operations": 0.5}
    assert (result["operations_ms"], result["operations"]) == (2.0, 2.0)
    settings = {"model": "M", "batch_size": 1, "precision": "fp32", "device": "cpu"}
    run = {"hardware": {"cpu": "C", "threads": 1}, "versions": {"torch": "2"}, "commit": "0", "uncommitted_changes": 0}
    settings |= {"torchcompile": False, "tune_open_clip": False}
    lines = table_of({"settings": settings, "run": run, "arms": {"clipyard": result}})
    assert "| matrix products | 1.5 (75%), 0 |" in lines
    assert "| between operations (Python) | 3.0 |" in lines


def test_the_page_holds_the_results():
    text = profile_step.PAGE.read_text()
    assert fill(text, {"profile": tables_of_results(profile_step.RESULTS)}) == text
