"""A device's products are exact, its rate is a rate, and one wrong bit in one of its products is found."""

from __future__ import annotations

import pytest
import torch

from training.diagnosis import device_speed
from training.diagnosis.device_speed import check_products, make_challenge, measure_device
from training.diagnosis.findings import Level

CPU = torch.device("cpu")


def test_the_cpu_multiplies_exactly_and_has_a_rate():
    findings, (rate,) = measure_device(CPU, seconds=0.05)
    assert [finding.level for finding in findings] == [Level.OK]
    assert (rate.check, rate.unit, rate.kind) == ("compute", "TFLOP/s", "CPU, float32")
    assert 1e-4 < rate.value < 100


def test_a_single_wrong_element_in_a_single_product_is_found():
    calls = 0

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        product = left @ right
        if calls == 2:
            product[300, 17] += 1
        return product

    finding = check_products(CPU, "GPU 3", seconds=0.1, multiply=multiply)
    assert finding.level is Level.BAD
    assert "GPU 3: 1 of" in finding.text
    assert "in 1 row(s), e.g. 300: the device corrupts data silently" in finding.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_partial_sum_is_too_large_for_half_precision(dtype: torch.dtype):
    """What makes the result the same in any order: integers up to 256 are exact in bf16."""
    left, right, vector, expected = make_challenge(512, dtype=dtype)
    product = left.double() @ right.double()
    assert product.abs().max() <= 256
    assert torch.equal((left @ right).double() @ vector, expected)


def test_what_the_device_raises_is_a_finding(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(device_speed, "check_products", fail)
    (finding,), rates = measure_device(CPU, seconds=0.05)
    assert (finding.level, rates) == (Level.BAD, [])
    assert "CPU: CUDA error: uncorrectable ECC error encountered: reboot the node" in finding.text
