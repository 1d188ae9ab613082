"""Measures all-reduces in groups of some ranks, so that a broken link spoils the measurement of its own group alone.

Every group is made for itself, beside torch's list of groups, of which each would begin with a collective of all ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from training.distributed.store_calls import StoreSilent, answer_within

_LONGER_THAN_US = timedelta(minutes=10)
_MOST_ROUNDS = 20
_ROUND_BUDGET_S = 1.0
_ABORT_LIMIT_S = 5.0


class LinkFailed(RuntimeError):
    """An all-reduce did not come to its end, or to the wrong result."""


class LinkRates:
    """Measures from one rank's side; the ranks of a group call ``measure`` with the same arguments."""

    def __init__(self, store: Store, *, rank: int, device: torch.device, backend: str, num_bytes: int) -> None:
        """
        Args:
            backend: ``nccl`` or ``gloo``.
            num_bytes: exchanged in one all-reduce.
        """
        # NCCL's watchdog would end this process for an error of one group.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        self._store = store
        self._rank = rank
        self._device = device
        self._backend = backend
        self._num_bytes = num_bytes
        self._group: Any = None

    def measure(self, name: str, ranks: Sequence[int], *, timeout_s: float) -> float:
        """GB/s on the busiest link: what a ring sends over each, 2 (n-1)/n of the bytes. Collective: all of ``ranks``.

        Raises:
            LinkFailed: it takes longer than ``timeout_s``, breaks off, or adds up wrongly.
        """
        try:
            return answer_within(timeout_s, lambda: self._measure(name, ranks, timeout_s))
        except StoreSilent:
            # Its kernels would go on waiting on the device, and the next group's with them.
            with suppress(RuntimeError):
                answer_within(_ABORT_LIMIT_S, self._abort)
            raise LinkFailed(f"no end within {timeout_s:g} s") from None
        except LinkFailed:
            raise
        except RuntimeError as error:
            raise LinkFailed(" ".join(str(error).split())[:200]) from error

    def _measure(self, name: str, ranks: Sequence[int], timeout_s: float) -> float:
        if self._device.type != "cuda":
            return self._measure_group(name, ranks, timeout_s)
        torch.cuda.set_device(self._device)  # of this thread
        # A stream of its own: what an earlier group left hanging is not waited for.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            return self._measure_group(name, ranks, timeout_s)

    def _measure_group(self, name: str, ranks: Sequence[int], timeout_s: float) -> float:
        place, size = ranks.index(self._rank), len(ranks)
        self._group = group = self._make_group(PrefixStore(name, self._store), place, size, timeout_s)
        try:
            numbers = torch.empty(self._num_bytes // 4, device=self._device)
            first_s = self._reduce(group, numbers, place, size)
            # The slowest decides how often, so that all do it equally often.
            slowest = torch.tensor([first_s], device=self._device)
            _wait(group, slowest, dist.ReduceOp.MAX)
            rounds = max(1, min(_MOST_ROUNDS, int(_ROUND_BUDGET_S / max(slowest.item(), 1e-6))))
            seconds = sum(self._reduce(group, numbers, place, size) for _ in range(rounds))
        except RuntimeError:
            self._abort()
            raise
        with suppress(RuntimeError):  # some backends of some releases have nothing to shut down
            group.shutdown()
        return 2 * (size - 1) / size * self._num_bytes * rounds / seconds / 1e9

    def _abort(self) -> None:
        with suppress(RuntimeError):
            if self._group is not None:
                self._group.abort()

    def _reduce(self, group: Any, numbers: torch.Tensor, place: int, size: int) -> float:
        """One all-reduce whose result is known, timed."""
        numbers.fill_(place + 1)
        self._finish()
        start = time.perf_counter()
        _wait(group, numbers, dist.ReduceOp.SUM)
        self._finish()
        seconds = time.perf_counter() - start
        wrong = (numbers != size * (size + 1) / 2).count_nonzero().item()
        if wrong:
            raise LinkFailed(f"{wrong} of {numbers.numel()} sums are wrong: the network corrupts data")
        return seconds

    def _make_group(self, store: Store, place: int, size: int, timeout_s: float) -> Any:
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _LONGER_THAN_US  # ours comes first, and names the group
            return dist.ProcessGroupNCCL(store, place, size, options)
        return dist.ProcessGroupGloo(store, place, size, timedelta(seconds=timeout_s))

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _wait(group: Any, tensor: torch.Tensor, operation: Any) -> None:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    group.allreduce([tensor], options).wait()
