"""Where the ranks say, when one of them sees no progress, what each of them is doing: small notes in the store.

It has a connection of its own and never waits long: in a hang the process that hosts the store may be the one that
is stopped.
"""

from __future__ import annotations

import contextlib

from torch.distributed.distributed_c10d import PrefixStore

from training.distributed.runtime import Runtime
from training.distributed.store_calls import answer_within

_ANSWER_S = 3.0
_READ_S_PER_RANK = 0.005
"""Added for each rank that has to be asked for by itself: ten times what a store that is busy takes for a request."""


class HangBoard:
    """The notes of one job; for a single process, what it posts itself. Made by all ranks, used by each for itself.

    Every method raises RuntimeError where the store does not answer.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._rank = runtime.rank
        self._world_size = runtime.world_size
        self._own: dict[int, str] = {}
        self._store = None if runtime.store is None else PrefixStore("hang", runtime.store.clone())

    def asked(self) -> bool:
        """Whether any rank has posted."""
        store = self._store
        return store is not None and answer_within(_ANSWER_S, lambda: store.check(["seats"]))

    def post(self, note: str) -> int:
        """Publishes this rank's note; returns its place among all notes, 1 for the first."""
        self._own[self._rank] = note
        store = self._store
        if store is None:
            return 1
        # The note first: a seat that is taken has one.
        answer_within(_ANSWER_S, lambda: store.set(f"note/{self._rank}", note))
        return answer_within(_ANSWER_S, lambda: store.add("seats", 1))

    def notes(self) -> dict[int, str]:
        """What has been posted so far, by rank."""
        store = self._store
        if store is None:
            return dict(self._own)
        return answer_within(self._read_s, lambda: self._read(store))

    def left(self) -> set[int]:
        """Ranks that are watched no more."""
        store = self._store
        if store is None:
            return set()
        return answer_within(self._read_s, lambda: self._find(store, "left", count=store.add("leavers", 0)))

    def leave(self) -> None:
        """This rank is watched no more: from now on its silence says nothing."""
        store = self._store
        if store is not None:
            with contextlib.suppress(RuntimeError):  # the job is ending by other means
                answer_within(_ANSWER_S, lambda: store.set(f"left/{self._rank}", "1"))
                answer_within(_ANSWER_S, lambda: store.add("leavers", 1))

    @property
    def _read_s(self) -> float:
        """For a big world it is longer: its store is not silent because it has much to say."""
        return _ANSWER_S + self._world_size * _READ_S_PER_RANK

    def _read(self, store: PrefixStore) -> dict[int, str]:
        ranks = sorted(self._find(store, "note", count=store.add("seats", 0)))
        notes = store.multi_get([f"note/{rank}" for rank in ranks]) if ranks else []  # one request
        return {rank: note.decode() for rank, note in zip(ranks, notes, strict=True)}

    def _find(self, store: PrefixStore, kind: str, *, count: int) -> set[int]:
        """The ranks with a key of this kind, of which there are at least ``count``."""
        ranks = range(self._world_size)
        if count == 0:
            return set()
        return set(ranks) if count >= self._world_size else _find_within(store, kind, ranks)


def _find_within(store: PrefixStore, kind: str, ranks: range) -> set[int]:
    """By halves: few requests where few are missing, which is what a hang looks like; twice the ranks at worst."""
    if store.check([f"{kind}/{rank}" for rank in ranks]):
        return set(ranks)
    if len(ranks) == 1:
        return set()
    middle = len(ranks) // 2
    return _find_within(store, kind, ranks[:middle]) | _find_within(store, kind, ranks[middle:])
