"""Which kernel computes attention: what is chosen from what the model calls, and that it is what runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from models.factory import create_model
from models.text_form import build_packer
from training.attention_kernel import (
    KERNELS,
    AttentionCall,
    attention_calls,
    attention_kernel,
    choose,
    enabled,
    measure,
    rank_by_time,
    why_not,
)
from training.precision import build_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
IMAGES = AttentionCall("image", 4, 2, 9, 9, 16, None, False, torch.float32)
READ = AttentionCall("text", 4, 2, 1, 9, 16, (4, 1, 1, 9), False, torch.float32)
HALF = IMAGES._replace(dtype=torch.bfloat16)


def calls_of(model: str, *, text_packing: str, precision: str = "amp_bf16") -> list[AttentionCall]:
    built = create_model(model, device="meta", reads_weights=False)
    texts = build_packer(built.config, text_packing=text_packing)(
        torch.ones(8, built.config.text_cfg.context_length, dtype=torch.int64)
    )
    images = torch.empty(8, 3, *built.config.vision_cfg.image_hw, device="meta")
    return attention_calls(built.model, images, texts.to("meta"), precision=build_precision(precision, CPU))


def test_the_calls_of_a_model_are_those_of_its_towers_at_the_batch_size():
    image, image_read, text, text_read = calls_of("demo-vit", text_packing="off")
    assert image == AttentionCall("image", 8, 6, 17, 17, 32, None, False, torch.bfloat16)
    assert image_read == image._replace(queries=1)
    assert text == AttentionCall("text", 8, 4, 32, 32, 32, None, True, torch.bfloat16)
    assert (text_read.queries, text_read.mask) == (1, (8, 1, 1, 32))


def test_packed_texts_and_convolutions_call_nothing():
    assert {call.tower for call in calls_of("demo-vit", text_packing="auto")} == {"image"}
    assert calls_of("convnext_base_w", text_packing="auto") == []
    assert calls_of("demo-vit", text_packing="auto", precision="fp32")[0].dtype == torch.float32


def test_the_calls_inside_timm_and_of_torchs_own_attention_are_found_too():
    assert calls_of("RN50", text_packing="auto")[0].heads == 32  # nn.functional.multi_head_attention_forward
    assert calls_of("ViT-B-16-SigLIP", text_packing="off")[0].queries == 196
    assert F.scaled_dot_product_attention.__module__ == "torch._C._nn"


class Kernels(TorchDispatchMode):
    """Notes which kernels of attention run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.seen |= {kernel for kernel in ("flash", "math") if "attention" in name and kernel in name}
        self.seen |= {"math"} if "softmax" in name else set()
        return function(*args, **(kwargs or {}))


def kernels_that_ran(queries: Tensor) -> set[str]:
    with Kernels() as kernels:
        F.scaled_dot_product_attention(queries, queries, queries)
    return kernels.seen


@pytest.mark.parametrize("name", ["flash", "math"])
def test_a_named_kernel_is_the_one_that_computes_until_it_is_left(name):
    before = torch._C._get_sdp_priority_order()
    queries = torch.randn(1, 2, 9, 16)
    with attention_kernel(name, calls=lambda: [IMAGES, READ], device=CPU, on_first_rank=lambda work: work()):
        assert kernels_that_ran(queries) == {name}
    assert kernels_that_ran(queries) == {"flash"}
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_preferred_kernel_comes_before_what_pytorch_prefers():
    with enabled(("cudnn", "flash", "math")):  # on a CPU PyTorch has no choice of order
        order = torch._C._get_sdp_priority_order()
        assert order[:3] == [int(KERNELS[name]) for name in ("cudnn", "flash", "math")]
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert kernels_that_ran(torch.randn(1, 2, 9, 16)) == {"flash"}


def test_a_program_of_another_choice_is_not_taken_from_torchs_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for order in ((), ("flash",), ("flash",), ()):
        torch._dynamo.reset()  # as a process that is started
        counters.clear()
        with enabled(order), torch.no_grad():
            torch.compile(F.scaled_dot_product_attention)(*(torch.ones(1, 2, 9, 16) for _ in range(3)))
        found.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert found == [0, 0, 1, 1]


def test_auto_asks_nobody_and_changes_nothing():
    def fail(*_: Any) -> Any:
        raise AssertionError("called")

    with attention_kernel("auto", calls=fail, device=CPU, on_first_rank=fail):
        assert torch._C._get_sdp_priority_order()[0] == int(KERNELS["flash"])


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_compute_the_model_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"--attention-kernel {name} cannot compute 4 sequences of 9 image tokens"):
        choose(name, [READ, IMAGES], device=CPU)
    with pytest.raises(ValueError, match="No viable backend.*Give another kernel, or auto"):
        choose(name, [IMAGES], device=CPU)


def test_a_single_query_per_sequence_is_left_to_math():
    assert why_not("efficient", READ, device=CPU)
    assert choose("math", [READ, IMAGES], device=CPU).order == ("math",)
    choice = choose("efficient", [READ], device=CPU)
    assert choice.order == ()
    assert "has no effect" in choice.message


@pytest.mark.parametrize(("call", "device", "place"), [(HALF, CPU, "on the CPU"), (IMAGES, CUDA, "in fp32")])
def test_the_fastest_has_nothing_to_choose_from_on_a_cpu_or_in_fp32(call, device, place):
    choice = choose("fastest", [call], device=device)
    assert choice.order == ()
    assert choice.message.endswith(f"nothing to choose from {place}")


def test_the_fastest_comes_first_and_all_others_stay():
    choice = rank_by_time({"flash": 0.002, "cudnn": 0.0015}, HALF)
    assert choice.order == ("cudnn", "flash", "efficient", "math")
    assert choice.message.endswith("flash 2.00 ms, efficient cannot, cudnn 1.50 ms")
    assert rank_by_time({}, HALF).order == ()


def test_a_measurement_is_the_time_of_a_pass_forward_and_backward():
    with Kernels() as kernels:
        seconds = measure("math", IMAGES, device=CPU)
    assert kernels.seen == {"math"}
    assert 0 < seconds < 0.2
