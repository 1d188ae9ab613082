"""Rows 35 to 37, 43 and 46: checkpoints that are not what was written, that lie, or that mean harm."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.damage import DAMAGES
from tests.faults.lab import Disagreement, Lab, Record, compare
from tests.faults.plan import Fault
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import DamagedCheckpoint

DO_NOT_REQUEUE = 93


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, nursery, fault_data) -> Path:
    """The directory of a run that was killed after step 8, with checkpoints of steps 3 and 6."""
    lab = Lab(tmp_path_factory.mktemp("killed"), nursery, data=fault_data)
    lab.run("r", plan=[*lab.saved("r", 3, 6), Fault("step", "kill", step=8)])
    assert lab.steps("r") == [3, 6]
    lab.close()
    return lab.run_directory("r")


@pytest.fixture
def copy(lab: Lab, killed: Path) -> Lab:
    """A lab that holds the killed run."""
    shutil.copytree(killed, lab.run_directory("r"))
    return lab


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    copy: Lab, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 35: what each of the damages looks like to the reader that a start uses first."""
    DAMAGES[damage](copy.checkpoint("r", 6))
    found = Checkpointer(copy.run_directory("r") / "checkpoints").newest()
    assert found == copy.checkpoint("r", 3)
    assert "step_00000006" in caplog.text


@pytest.mark.parametrize("damage", ["bit flipped", "manifest missing", "file of another step"])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    copy: Lab, undisturbed: Callable[..., Record], damage: str
) -> None:
    """Row 35, end to end: another start replaces what is damaged."""
    DAMAGES[damage](copy.checkpoint("r", 6))
    ended = copy.finish("r")
    assert copy.first_step("r") == 3
    assert "passed over" in ended.text or "Skipping a damaged checkpoint" in ended.text
    compare(undisturbed(), copy.record("r"))


def test_without_the_hashes_a_flipped_bit_is_loaded(copy: Lab) -> None:
    """Negative control of row 35."""
    DAMAGES["bit flipped"](copy.checkpoint("r", 6))
    copy.finish("r", plan=[Fault("check_content", "skip")])
    assert copy.first_step("r") == 6


@pytest.mark.parametrize("damage", ["bit flipped", "manifest missing"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(copy: Lab, damage: str) -> None:
    """Row 36."""
    for step in (3, 6):
        DAMAGES[damage](copy.checkpoint("r", step)) if step == 6 else DAMAGES["truncated"](copy.checkpoint("r", step))
    before = _content(copy.run_directory("r") / "checkpoints")
    ended = copy.run("r")
    assert ended.codes == [DO_NOT_REQUEUE, DO_NOT_REQUEUE]
    assert "None of the 2 step checkpoints" in ended.text
    assert "--allow-restart-from-zero" in ended.text
    assert _content(copy.run_directory("r") / "checkpoints") == before


def test_with_permission_it_is_started_over_and_the_damaged_ones_are_kept(
    copy: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Negative control of row 36: what the refusal keeps from happening."""
    for step in (3, 6):
        DAMAGES["truncated"](copy.checkpoint("r", step))
    copy.finish("r", "--allow-restart-from-zero")
    assert copy.first_step("r") == 0
    assert len(list((copy.run_directory("r") / "checkpoints").glob("damaged-step_*"))) == 2
    compare(undisturbed(), copy.record("r"))


def test_a_rank_that_does_not_see_a_checkpoint_yet_takes_rank_0s_word(
    copy: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 37: its listing is of another moment."""
    copy.finish("r", plan=[Fault("list_steps", "skip", rank=1, with_={"value": []})])
    assert copy.first_step("r") == 6
    compare(undisturbed(), copy.record("r"))


def test_a_rank_that_cannot_read_a_checkpoint_takes_all_to_the_one_before(
    copy: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Row 37: the files of the newest are not there for rank 1."""
    hidden = Fault("open_file", "hide", rank=1, with_={"part": "step_00000006"})
    ended = copy.finish("r", plan=[hidden])
    assert copy.first_step("r") == 3
    assert "passed over" in ended.text
    compare(undisturbed(), copy.record("r"))


def test_ranks_that_see_no_common_checkpoint_fail_together(copy: Lab) -> None:
    """Row 37: rank 1 sees none of the files."""
    ended = copy.run("r", plan=[Fault("open_file", "hide", rank=1, with_={"part": "step_"})])
    assert ended.codes == [DO_NOT_REQUEUE, DO_NOT_REQUEUE]
    assert copy.steps("r") == [3, 6]


def test_without_the_agreement_a_rank_that_cannot_read_spoils_the_run(
    copy: Lab, undisturbed: Callable[..., Record]
) -> None:
    """Negative control of row 37: faults stay with the rank that finds them."""
    hidden = Fault("open_file", "hide", rank=1, with_={"part": "step_00000006/optimizer"})
    copy.finish("r", plan=[hidden, Fault("agree", "skip")])
    assert copy.first_step("r") == 6
    with pytest.raises(Disagreement, match="losses differ"):
        compare(undisturbed(), copy.record("r"))


@pytest.mark.parametrize("days", [-400, 400])
def test_times_of_files_and_the_clock_decide_nothing(copy: Lab, undisturbed: Callable[..., Record], days: int) -> None:
    """Row 43: the older checkpoint looks newer, the lease too, and the clock of rank 0 jumps while it trains."""
    for number, path in enumerate(sorted(copy.run_directory("r").rglob("*"))):
        moment = time.time() + 86400 * days * (1 + number % 3)
        os.utime(path, (moment, moment))
    past = time.time() - 3 * 86400
    os.utime(copy.checkpoint("r", 6), (past, past))
    jump = Fault("step", "shift_clock", step=7, with_={"seconds": 86400.0 * days})
    copy.finish("r", "--timeout-step", "60", "--save-every-n-minutes", "30", plan=[jump])
    assert copy.first_step("r") == 6
    compare(undisturbed(), copy.record("r"))


def test_a_choice_by_time_would_take_the_older_checkpoint(copy: Lab) -> None:
    """Negative control of row 43."""
    past = time.time() - 86400
    os.utime(copy.checkpoint("r", 6), (past, past))
    copy.finish("r", plan=[Fault("candidates", "newest_by_time")])
    assert copy.first_step("r") == 3


class Harm:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.canary}",)


def _malicious_epoch_file(directory: Path, harm: Harm) -> str:
    path = directory / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "x", "state_dict": harm}, path)
    return str(path)


def _malicious_file_in_step(directory: Path, harm: Harm) -> str:
    """A DCP directory's metadata, and one of its bytes entries, dressed up as a checkpoint of ours."""
    step = directory / "step_00000006"
    for name in (".metadata", "__0_0.distcp", "model.safetensors", "train.json", "MANIFEST.json"):
        step.mkdir(exist_ok=True)
        (step / name).write_bytes(pickle.dumps(harm))
    return str(step)


def _huge_header(directory: Path, harm: Harm) -> str:
    step = directory / "step_00000006"
    shutil.copytree(sorted(directory.glob("run/checkpoints/step_*"))[-1], step)
    data = bytearray((step / "model.safetensors").read_bytes())
    data[:8] = (1 << 62).to_bytes(8, "little")
    (step / "model.safetensors").write_bytes(bytes(data))
    _sign_again(step)
    return str(step)


def _traversal(directory: Path, harm: Harm) -> str:
    step = directory / "step_00000006"
    shutil.copytree(sorted(directory.glob("run/checkpoints/step_*"))[-1], step)
    _sign_again(step)
    manifest = json.loads((step / "MANIFEST.json").read_text())
    manifest["files"]["../../../etc/passwd"] = {"size": 1, "sha256": "0" * 64}
    (step / "MANIFEST.json").write_text(json.dumps(manifest))
    return str(step)


HARMFUL = {
    "pickle in a .pt": _malicious_epoch_file,
    "pickles in a step directory": _malicious_file_in_step,
    "a header of 4 EB": _huge_header,
    "a manifest that names foreign files": _traversal,
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_checkpoint_that_means_harm_is_refused_and_runs_no_code(lab: Lab, killed: Path, kind: str) -> None:
    """Row 46."""
    shutil.copytree(killed, lab.root / "run")
    canary = lab.root / "canary"
    path = HARMFUL[kind](lab.root, Harm(canary))
    ended = lab.run("r", "--resume", path, world_size=1)
    assert ended.codes[0] in (2, DO_NOT_REQUEUE)
    assert not canary.exists()
    assert "Traceback" not in ended.text


def test_a_reader_that_unpickles_everything_runs_the_code(lab: Lab) -> None:
    """Negative control of row 46: the file is as harmful as it claims."""
    canary = lab.root / "canary"
    path = _malicious_epoch_file(lab.root, Harm(canary))
    lab.run("r", "--resume", path, world_size=1, plan=[Fault("torch_load", "unpickle_everything")])
    assert canary.exists()


def _sign_again(step: Path) -> None:
    """A manifest that fits the changed files, and the directory's name."""
    train = json.loads((step / "train.json").read_text())
    (step / "train.json").write_text(json.dumps(train | {"step": _step_of(step)}))
    manifest = json.loads((step / "MANIFEST.json").read_text())
    manifest["step"] = _step_of(step)
    manifest.pop("sha256", None)
    for name in manifest["files"]:
        data = (step / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (step / "MANIFEST.json").write_text(json.dumps(manifest))


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def _content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_damage_is_damage(copy: Lab) -> None:
    """Negative control of the table of damages: without one the checkpoint is taken."""
    checkpointer = Checkpointer(copy.run_directory("r") / "checkpoints")
    assert checkpointer.newest() == copy.checkpoint("r", 6)
    for step in (3, 6):
        DAMAGES["empty directory"](copy.checkpoint("r", step))
    with pytest.raises(DamagedCheckpoint, match="None of the 2"):
        checkpointer.newest()
