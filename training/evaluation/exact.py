"""Products of fp32 features in full fp32, where training has allowed the GPU to shorten them to TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Within it (or in a function decorated with it) fp32 matrix products keep all 24 bits.

    TF32 keeps 11: enough for a tower, but scores that differ in the fourth digit would tie, and ranks hang on them.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
