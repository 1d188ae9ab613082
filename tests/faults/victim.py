"""A training process to which things happen: ``python -m tests.faults.victim FLAGS`` with a plan in its environment.

The training code has no hooks for this: the functions of ``points.POINTS`` are wrapped here, and then it runs as ever.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.faults.acts import ACTS, Instead, Moment
from tests.faults.plan import PLAN_VARIABLE, Fault, decode
from tests.faults.points import wrap


class Victim:
    """Strikes when the plan says so."""

    def __init__(self, faults: Sequence[Fault], *, rank: int) -> None:
        self._faults = faults
        self._rank = rank
        self._parts: Any = None
        self._calls: Counter[str] = Counter()

    def prepare(self) -> None:
        """Wraps every function that the plan names, and the one that tells us the step."""
        for name in {"train", *(fault.at for fault in self._faults)}:
            wrap(name, lambda function, args, kwargs, name=name: self._reach(name, function, args, kwargs))

    def _reach(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "train":
            self._parts = kwargs["parts"]
        step = None if self._parts is None else self._parts.state.step
        call = self._calls[name]
        self._calls[name] += 1
        due = [
            fault for fault in self._faults if fault.at == name and fault.strikes(rank=self._rank, step=step, call=call)
        ]
        moment = Moment(list(args), dict(kwargs), self._parts, self._rank)
        try:
            self._strike(moment, [fault for fault in due if not fault.after])
            moment.result = function(*moment.args, **moment.kwargs)
        except Instead as instead:
            moment.result = instead.value
        finally:
            for undo in moment.undo:
                undo()
        self._strike(moment, [fault for fault in due if fault.after])
        return moment.result

    def _strike(self, moment: Moment, faults: Sequence[Fault]) -> None:
        for fault in faults:
            ACTS[fault.act](moment, **fault.with_)


def run(argv: Sequence[str]) -> None:
    """Trains with the plan of this process's environment."""
    from training.main import main

    Victim(decode(os.environ.get(PLAN_VARIABLE, "[]")), rank=int(os.environ.get("RANK", "0"))).prepare()
    main(list(argv))


if __name__ == "__main__":
    run(sys.argv[1:])
