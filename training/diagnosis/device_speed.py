"""Measures a device: are its matrix products right, how fast are they, and how fast do bytes come and go.

Products are checked without a reference device. The matrices hold -1, 0 and 1, so that every partial sum is a small
integer, which bf16 represents exactly, in whatever order a kernel adds; and A(Bv) on the CPU says in n^2 operations
what (AB)v must be (R. Freivalds, 1977). One wrong element in any of hundreds of products is found, and its row named.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.diagnosis.findings import Finding, Rate, bad, ok

_CHECKED_SIZE = {"cuda": 4096, "cpu": 512}
"""Rows of the checked product: on a GPU enough for several tiles on each of its processors."""
_TIMED_SIZE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = 256 << 20
_COPIES = 5
_FREE_AT_LEAST = 0.9
"""Of a GPU's memory, before we use any of it."""


class Measured(NamedTuple):
    """What was found on a device."""

    findings: list[Finding]
    rates: list[Rate]


class Challenge(NamedTuple):
    """A product whose result is known."""

    left: Tensor
    """[n, n]"""
    right: Tensor
    """[n, n]"""
    vector: Tensor
    """v, [n], fp64"""
    expected: Tensor
    """A(Bv), [n], fp64"""


def measure_device(device: torch.device, *, seconds: float) -> Measured:
    """All of it, in about three times ``seconds``. What the device raises is a finding."""
    place = f"GPU {device.index}" if device.type == "cuda" else "CPU"
    try:
        findings = [_check_free_memory(device, place)] if device.type == "cuda" else []
        findings.append(check_products(device, place, seconds=seconds))
        rates = [_time_products(device, place, seconds=seconds)]
        if device.type == "cuda":
            rates += _time_copies(device, place)
    except RuntimeError as error:  # torch's errors of the device are of this type
        said = " ".join(str(error).split())
        return Measured([bad("matrix product", f"{place}: {said[:300]}: reboot the node")], [])
    return Measured(findings, rates)


def make_challenge(size: int, *, dtype: torch.dtype, seed: int = 0) -> Challenge:
    """On the CPU. With a third of the entries not 0, no sum of 4,096 products comes near 256."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (_signs(size, generator) for _ in range(2))
    vector = torch.randint(-8, 9, (size,), generator=generator).double()
    return Challenge(left.to(dtype), right.to(dtype), vector, left.double() @ (right.double() @ vector))


def check_products(
    device: torch.device,
    place: str,
    *,
    seconds: float,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Finding:
    """Multiplies for some seconds, and checks every product."""
    dtype = _fast_dtype(device)
    challenge = make_challenge(_CHECKED_SIZE[device.type], dtype=dtype)
    left, right, vector, expected = (part.to(device) for part in challenge)
    wrong = torch.zeros_like(expected)  # [n]: products in which a row was wrong
    count, deadline = 0, time.monotonic() + seconds
    while not count or time.monotonic() < deadline:
        for _ in range(8 if device.type == "cuda" else 1):
            wrong += (multiply(left, right).double() @ vector) != expected
            count += 1
        _wait_for(device)
    rows = wrong.count_nonzero().item()
    if rows:
        worst = int(wrong.argmax().item())
        return bad(
            "matrix product",
            f"{place}: {wrong.max().item():.0f} of {count} products are wrong, in {rows} row(s), e.g. {worst}: the "
            "device corrupts data silently. Have it replaced",
        )
    return ok("matrix product", f"{place}: {count} products exact ({str(dtype).removeprefix('torch.')})")


def _check_free_memory(device: torch.device, place: str) -> Finding:
    free, total = torch.cuda.mem_get_info(device)
    text = f"{place}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if free < _FREE_AT_LEAST * total:
        return bad("GPU memory", f"{text}: another process holds the rest. End it (`nvidia-smi` lists it)")
    return ok("GPU memory", text)


def _time_products(device: torch.device, place: str, *, seconds: float) -> Rate:
    """Of normal random numbers: zeros and ones draw less power, and would hide a device that is short of it."""
    size, dtype = _TIMED_SIZE[device.type], _fast_dtype(device)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = left @ right
    _wait_for(device)
    count, elapsed_s, start = 0, 0.0, time.perf_counter()
    while elapsed_s < seconds:
        for _ in range(16 if device.type == "cuda" else 1):
            torch.mm(left, right, out=product)
            count += 1
        _wait_for(device)
        elapsed_s = time.perf_counter() - start
    kind = f"{_name(device)}, {str(dtype).removeprefix('torch.')}"
    return Rate("compute", 2 * size**3 * count / elapsed_s / 1e12, "TFLOP/s", kind, place)


def _time_copies(device: torch.device, place: str) -> list[Rate]:
    """Between pinned memory and the device."""
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    rates = []
    for check, target, source in (("host to device", there, host), ("device to host", host, there)):
        target.copy_(source)  # warm-up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_COPIES):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        gb = _COPIES * _COPY_BYTES / 1e9
        rates.append(Rate(check, gb / (time.perf_counter() - start), "GB/s", _name(device), place))
    return rates


def _signs(size: int, generator: torch.Generator) -> Tensor:
    """[size, size] of -1, 0 and 1, two thirds of them 0."""
    drawn = torch.randint(0, 6, (size, size), generator=generator, dtype=torch.int8)
    return (drawn == 5).to(torch.int8) - (drawn == 0).to(torch.int8)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """What the device multiplies fastest, and a run would use."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
