"""The table of names that faults strike at, and the tools that strike."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.lab import Disagreement, Lab, Record, compare
from tests.faults.plan import Fault, decode, encode
from tests.faults.points import POINTS, find


@pytest.mark.parametrize("name", POINTS)
def test_every_point_is_a_function_of_the_training_code(name: str) -> None:
    find(name)


def test_a_point_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POINTS, "gone", "training.train:no_such_function")
    with pytest.raises(LookupError, match="'gone' is training.train:no_such_function, which is gone"):
        find("gone")


def test_a_plan_reaches_the_victim_as_it_is() -> None:
    plan = [Fault("step", "kill", rank=1, step=3), Fault("rename", "sleep", after=True, with_={"seconds": 1.5})]
    assert decode(encode(plan)) == plan


def test_a_fault_strikes_at_its_rank_step_and_call_only() -> None:
    fault = Fault("step", "kill", rank=1, step=3, until=5)
    assert [step for step in range(8) if fault.strikes(rank=1, step=step, call=step)] == [3, 4]
    assert not fault.strikes(rank=0, step=3, call=3)
    assert not fault.strikes(rank=1, step=None, call=0)
    assert Fault("rename", "kill", call=2).strikes(rank=0, step=None, call=2)
    assert not Fault("rename", "kill", call=2).strikes(rank=0, step=None, call=1)


def test_records_that_differ_anywhere_disagree(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    record = undisturbed()
    compare(record, record)
    with pytest.raises(Disagreement, match="samples of rank 1 differ"):
        compare(record, record._replace(samples={**record.samples, 1: record.samples[1][:-1]}))
    with pytest.raises(Disagreement, match="losses differ, first of step 7"):
        compare(record, record._replace(losses={**record.losses, 7: 0.0}))
    with pytest.raises(Disagreement, match="weights differ"):
        compare(record, record._replace(weights="0" * 64))
