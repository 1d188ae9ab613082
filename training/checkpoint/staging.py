"""Copies a rank's share of the state to host memory, so that training goes on while the copy is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from training.data.prefetch import pin

Key = TypeVar("Key")
_ALIGNMENT = 64


class Staging:
    """One buffer that all saves of a run use in turn: page-locked where it is filled from a GPU.

    A buffer of its own for every save would cost more than the copy: the system fills new memory with zeros first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], None] | None = None

    def copy(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Copies that hold what the tensors hold now; the copies of the last call are overwritten.

        On a GPU it waits until the copies are there.  # host sync
        """
        offsets, total = {}, 0
        for key, tensor in tensors.items():
            offsets[key] = total
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._reserve(total)
        copies = {key: self._view(offsets[key], tensor) for key, tensor in tensors.items()}
        for key, copy in copies.items():
            copy.copy_(tensors[key].detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # host sync
        return copies

    def _view(self, offset: int, tensor: Tensor) -> Tensor:
        return self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _reserve(self, num_bytes: int) -> None:
        if len(self._buffer) >= num_bytes:
            return
        if self._unpin is not None:
            self._unpin()
        self._buffer = torch.empty(0, dtype=torch.uint8)  # before the new one is allocated
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        if self._device.type == "cuda":
            self._unpin = pin(self._buffer)
