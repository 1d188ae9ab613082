"""A run with a curriculum that is killed at or around the end of a phase ends like one that is not."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.damage import DAMAGES
from tests.faults.lab import Lab, Record, compare, events
from tests.faults.plan import Fault
from training.checkpoint.checkpointer import read_step_checkpoint

PHASES = """
- {until_samples: 32, image_size: 16, text_length: 6, patch_dropout: 0}
- {until_samples: 50, image_size: 32, batch_size: 2, aug_cfg: {scale: [0.9, 1.0]}}
- {image_size: 24}
"""
"""Two ranks: 4 steps of 8 samples, 5 of 4, 6 of 8. The last begins with a step that is saved anyway."""


USR1 = {"name": "SIGUSR1"}


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("phases") / "phases.yaml"
    path.write_text(PHASES)
    return "--phases", str(path)


@pytest.mark.parametrize(
    ("fault", "first_step"),
    [
        (Fault("capture", "kill", rank=1, step=4), 3),
        (Fault("load", "kill", rank=0), 4),
        (Fault("step", "kill", rank=1, step=10), 9),
    ],
    ids=["before the save", "after the save", "in the last phase"],
)
def test_a_kill_around_the_end_of_a_phase_changes_nothing(
    lab: Lab, undisturbed: Callable[..., Record], phases: tuple[str, str], fault: Fault, first_step: int
) -> None:
    expected = undisturbed(*phases)
    ended = lab.run("r", *phases, plan=[fault])
    assert -signal.SIGKILL in ended.codes, ended.text[-3000:]
    lab.finish("r", *phases)
    assert lab.first_step("r") == first_step
    compare(expected, lab.record("r"))
    assert [event["number"] for event in events(lab.run_directory("r"), "phase")] == [1, 2, 3]


@pytest.mark.parametrize(
    "fault",
    [Fault("step", "send", rank=1, step=3, with_={"name": "SIGTERM"}), Fault("load", "send", rank=0, with_=USR1)],
    ids=["at the last step", "while the next phase is built"],
)
def test_a_signal_around_the_end_of_a_phase_changes_nothing(
    lab: Lab, undisturbed: Callable[..., Record], phases: tuple[str, str], fault: Fault
) -> None:
    ended = lab.run("r", *phases, plan=[fault])
    assert ended.codes == [0, 0], ended.text[-3000:]
    assert lab.steps("r")[-1] == 4
    saves = [line for line in ended.text.splitlines() if "Saved " in line and "step_00000004" in line]
    assert len(saves) == 1  # what lies there is not written again
    lab.finish("r", *phases)
    assert lab.first_step("r") == 4
    compare(undisturbed(*phases), lab.record("r"))


def test_a_damaged_checkpoint_is_passed_over_for_one_of_the_phase_before(
    lab: Lab, undisturbed: Callable[..., Record], phases: tuple[str, str]
) -> None:
    lab.run("r", *phases, plan=[*lab.saved("r", 3), Fault("step", "kill", rank=1, step=5)])
    assert lab.steps("r") == [3, 4]
    DAMAGES["bit flipped"](lab.checkpoint("r", 4))
    ended = lab.finish("r", *phases)
    assert "A damaged checkpoint is passed over" in ended.text
    assert lab.first_step("r") == 3
    compare(undisturbed(*phases), lab.record("r"))


def test_a_phase_whose_end_cannot_be_saved_ends_the_job(
    lab: Lab, undisturbed: Callable[..., Record], phases: tuple[str, str]
) -> None:
    plan = [*lab.saved("r", 3), Fault("write_share", "fail_with_errno", rank=0, call=1, with_={"name": "ENOSPC"})]
    ended = lab.run("r", *phases, plan=plan)
    assert 0 not in ended.codes
    assert "The next phase cannot begin: step 4 could not be saved" in ended.text
    lab.finish("r", *phases)
    compare(undisturbed(*phases), lab.record("r"))


def test_every_sample_comes_once_and_position_embeddings_have_the_last_size(lab: Lab, phases: tuple[str, str]) -> None:
    """Also sharded: rank 1 reads the rows that rank 0 has resized."""
    lab.finish("r", *phases, "--fsdp")
    samples = lab.record("r").samples
    seen = Counter((slot, index) for rows in samples.values() for _, slot, index in rows)
    assert set(seen.values()) == {1}
    assert Counter(Counter(step for step, *_ in samples[0]).values()) == {4: 10, 2: 5}
    saved = read_step_checkpoint(lab.checkpoint("r", 15))
    assert saved.model["visual.positional_embedding"].shape == (1 + 3 * 3, 16)
    assert bool((saved.optimizer["visual.positional_embedding//exp_avg_sq"] >= 0).all())
    assert (saved.train["samples_seen"], saved.train["phase"]) == (100, {"number": 3, "image_size": [24]})
    lines = [json.loads(line) for line in Path(lab.run_directory("r") / "metrics.jsonl").read_text().splitlines()]
    flops = [line["train/exaflops"] for line in lines]
    assert flops == sorted(flops)
    assert [line["train/phase"] for line in lines] == [1.0] * 4 + [2.0] * 5 + [3.0] * 6
