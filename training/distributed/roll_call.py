"""Finds out who of a job is there, without waiting for ever for who is not: the store alone, no process group.

A process group begins with a collective, which a single missing rank turns into a time-out on all of them. Here every
rank leaves notes in the store of rank 0, and whoever leaves none in time is known by that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from training.distributed.store_calls import answer_within

_POLL_S = 0.1
_ATTEMPT = timedelta(seconds=3)
_OPENING = timedelta(seconds=10)
"""Rank 0 is its own first client, and may not find itself: the name of its node may be unknown on it."""
_REQUEST = timedelta(minutes=5)


class RollCall:
    """The notes of a job's ranks. Nothing here is a collective."""

    def __init__(
        self, host: str, ports: Sequence[int], *, identity: str, rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Rank 0 opens the store at the first port that is free, the others look for it.

        Args:
            identity: of this start of the job; what answers under another one is not ours.

        Raises:
            RuntimeError: no port is free, or none of them answers within ``timeout_s``.
        """
        self.host = host
        self.rank = rank
        self.world_size = world_size
        # torchrun's agent has a store at this address already.
        opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if opens:
            self._store = self._open(ports)
            self.note("identity", identity)
        else:
            if rank == 0:
                TCPStore(host, ports[0], world_size, timeout=_ATTEMPT, multi_tenant=True).set("identity", identity)
            self._store = self._find(ports, identity, timeout_s)

    def _open(self, ports: Sequence[int]) -> Store:
        for port in ports:
            try:
                store = TCPStore(
                    self.host,
                    port,
                    self.world_size,
                    is_master=True,
                    timeout=_OPENING,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            except RuntimeError as error:
                said = str(error).splitlines()[0]
            else:
                store.set_timeout(_REQUEST)
                return store
        raise RuntimeError(
            f"rank 0 cannot listen at {self.host}, port {' or '.join(map(str, ports))} ({said}): another process may "
            "have it (export another MASTER_PORT), or this node does not know itself by that name (--slurm-host-suffix)"
        )

    def _find(self, ports: Sequence[int], identity: str, timeout_s: float) -> Store:
        """Again and again: rank 0 may come later, and another program may have the first port."""
        deadline = time.monotonic() + timeout_s
        said = "no answer"
        while time.monotonic() < deadline:
            for port in ports:
                try:
                    # Another program at this port may take the connection and never say a word: no timeout ends that.
                    store, found = answer_within(2 * _ATTEMPT.total_seconds(), partial(self._connect, port))
                    if found == identity:
                        return store
                    said = "another job answers"
                except RuntimeError as error:
                    said = str(error).splitlines()[0]
            time.sleep(_POLL_S)
        raise RuntimeError(
            f"rank 0 cannot be reached at {self.host}, port {' or '.join(map(str, ports))} within {timeout_s:g} s "
            f"({said}): its node is down, its process did not start, or the network does not let it through"
        )

    def _connect(self, port: int) -> tuple[Store, str]:
        store = TCPStore(self.host, port, self.world_size, timeout=_ATTEMPT, wait_for_workers=False)
        identity = bytes(store.get("identity")).decode()
        store.set_timeout(_REQUEST)
        return store, identity

    def part(self, name: str) -> Store:
        """A store of its own for one purpose."""
        return PrefixStore(name, self._store)

    def note(self, key: str, text: str) -> None:
        """Leaves a note for all."""
        self._store.set(key, text)

    def read(self, key: str, *, timeout_s: float) -> str | None:
        """A note that some rank leaves; None if it does not within the time."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError:  # torch's DistStoreError
            return None
        return bytes(self._store.get(key)).decode()

    def collect(self, key: str, ranks: Iterable[int], *, timeout_s: float) -> dict[int, str]:
        """The notes ``key/RANK`` of those ranks that leave one within the time; at once when all are there."""
        deadline = time.monotonic() + timeout_s
        notes: dict[int, str] = {}
        missing = list(ranks)
        while missing:
            for rank in missing:
                if self._store.check([f"{key}/{rank}"]):
                    notes[rank] = bytes(self._store.get(f"{key}/{rank}")).decode()
            missing = [rank for rank in missing if rank not in notes]
            if missing and time.monotonic() > deadline:
                break
            time.sleep(_POLL_S if missing else 0)
        return notes

    def meet(self, name: str, *, size: int, timeout_s: float) -> bool:
        """Returns when ``size`` ranks have called it, or after the time; whether all came."""
        if self._store.add(f"{name}/arrived", 1) >= size:
            self._store.set(f"{name}/all", "1")
        return self.read(f"{name}/all", timeout_s=timeout_s) is not None
