"""Work done once at start-up and shared by all ranks; what fails on one rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

from training.distributed.collectives import broadcast_object, gather_objects

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Outcome(NamedTuple, Generic[Result]):
    """What a rank came to; it travels between ranks, so an error is its text."""

    result: Result | None
    fault: str
    trouble: RuntimeError | None = None
    """What the environment is to blame for; its type may carry an exit code."""

    def value(self) -> Result:
        if self.trouble is not None:
            raise self.trouble
        if self.fault:
            raise ValueError(self.fault)
        return cast(Result, self.result)


def on_first_rank(work: Callable[[], Result], *, rank: int) -> Result:
    """Rank 0 does the work (scanning a shared file system, say), all ranks get its result. Collective: all ranks.

    Raises:
        ValueError, RuntimeError: what the work raised, on every rank.
    """
    outcome: _Outcome[Result] = _attempt(work) if rank == 0 else _Outcome(None, "")
    return broadcast_object(outcome).value()  # collective: all ranks


def spread(items: Sequence[Item], work: Callable[[Item], Result], *, rank: int, world_size: int) -> list[Result]:
    """Item i is worked on by rank i % world_size; all ranks get all results in order. Collective: all ranks.

    Raises:
        ValueError: what the work on any item raised, on every rank.
    """
    mine = _attempt(lambda: [work(item) for item in items[rank::world_size]])
    shares = [outcome.value() for outcome in gather_objects(mine)]  # collective: all ranks
    return [shares[place % world_size][place // world_size] for place in range(len(items))]


def _attempt(work: Callable[[], Result]) -> _Outcome[Result]:
    try:
        return _Outcome(work(), "")
    except (ValueError, OSError) as error:
        return _Outcome(None, str(error) or repr(error))
    except RuntimeError as error:
        return _Outcome(None, "", error)
