"""Row 28: a disk that is full, read-only or failing while checkpoints are written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.lab import Lab, Record, compare
from tests.faults.plan import Fault

FULL = {"size": 1 << 20}
"""Of 5 MB that a checkpoint takes."""
FAULTS = {
    "full": ("limit_file_size", FULL),
    "no space": ("fail_with_errno", {"name": "ENOSPC"}),
    "read-only": ("fail_with_errno", {"name": "EROFS"}),
    "not an OSError": ("fail", {"text": "[enforce fail inline_container.cc] unexpected pos"}),
}


def _one_save_fails(lab: Lab, kind: str) -> list[Fault]:
    """The second one of three."""
    act, arguments = FAULTS[kind]
    return [*lab.saved("r", 3), Fault("write_share", act, rank=0, call=1, with_=arguments)]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_save_that_fails_is_told_and_the_next_one_is_made(
    lab: Lab, undisturbed: Callable[..., Record], kind: str
) -> None:
    ended = lab.finish("r", plan=_one_save_fails(lab, kind))
    assert "A save failed (1 in a row, 3 end the run)" in ended.text
    assert 6 not in lab.steps("r")
    assert lab.steps("r")[-1] == 12
    compare(undisturbed(), lab.record("r"))


def test_saves_that_go_on_failing_end_the_run_with_the_old_checkpoint_intact(
    lab: Lab, undisturbed: Callable[..., Record]
) -> None:
    later = [
        *(Fault("write_share", "limit_file_size", call=call, with_=FULL) for call in range(1, 9)),
        Fault("step", "sleep", with_={"seconds": 0.15}),
    ]
    ended = lab.run("r", "--max-save-failures", "2", plan=[*lab.saved("r", 3), *later])
    assert 0 not in ended.codes
    assert "2 saves in a row have failed" in ended.text
    assert "free space on" in ended.text
    assert lab.steps("r") == [3]
    assert not lab.leftovers("r")
    lab.finish("r")
    assert lab.first_step("r") == 3
    compare(undisturbed(), lab.record("r"))


def test_a_run_whose_last_save_fails_does_not_end_in_order(lab: Lab) -> None:
    """Whoever reads its exit code must not take it for finished."""
    later = [Fault("write_share", "limit_file_size", call=call, with_=FULL) for call in range(1, 9)]
    ended = lab.run("r", "--max-save-failures", "9", plan=[*lab.saved("r", 3), *later])
    assert 0 not in ended.codes
    assert "The last save of the run failed" in ended.text


def test_without_the_cleaning_a_full_disk_stays_full(lab: Lab) -> None:
    """Negative control: what a failed attempt has written is left."""
    ended = lab.run("r", plan=[*_one_save_fails(lab, "full"), Fault("abandon", "skip")])
    assert ended.codes == [0, 0]
    assert lab.leftovers("r")


def test_a_failure_that_is_not_counted_is_never_heard_of(lab: Lab) -> None:
    """Negative control: the last save fails, nobody notes it, and the run claims to have finished."""
    later = [Fault("write_share", "limit_file_size", call=call, with_=FULL) for call in range(1, 9)]
    ended = lab.run("r", plan=[*lab.saved("r", 3), *later, Fault("note_failure", "skip")])
    assert ended.codes == [0, 0]
    assert lab.steps("r") == [3]
