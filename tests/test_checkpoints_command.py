"""``clipyard checkpoints``: what it prints, what it writes, and that OpenCLIP loads it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.factory import create_model
from tests.models.tiny import write_model_file
from training.checkpoint.checkpointer import Checkpointer, StepCheckpoint
from training.checkpoint.mirror import Mirror
from training.checkpoint.mirror_store import open_store
from training.checkpoint.tags import Tags
from training.commands.main import main

STEPS = (10, 20, 30)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def clipyard(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["checkpoints", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write_model_file(tmp_path, "tiny-for-checkpoints")


@pytest.fixture
def run(tmp_path: Path, model_file: Path) -> Path:
    """A run with three checkpoints of a real model; 10 is good, 20 the best, 30 suspect."""
    directory = tmp_path / "logs" / "run"
    checkpointer = Checkpointer(directory / "checkpoints", keep=9, generation=4)
    for step in STEPS:
        checkpointer.save(step, content(model_file, step))
    change = Tags().with_good(10).with_metric(metric="top1", step=20, value=0.5).with_suspect([30])
    checkpointer.change_tags(lambda _: change)
    return directory


def content(model_file: Path, step: int, **config: Any) -> StepCheckpoint:
    weights = weights_of(model_file, step)
    train = {"step": step, "epoch": step // 20, "samples_seen": 64 * step, "optimizer": {}}
    train["config"] = {"model": str(model_file), "siglip": False, **config}
    train["param_groups"] = [{"names": sorted(weights), "lr": 0.1}]
    optimizer = {f"{name}//exp_avg": torch.ones_like(tensor) for name, tensor in weights.items()}
    return StepCheckpoint(weights, optimizer, {}, {}, train)


def weights_of(model_file: Path, step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return dict(create_model(str(model_file)).model.state_dict())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_list_shows_tags_and_damages(run: Path, clipyard: Command) -> None:
    (run / "checkpoints" / "step_00000010" / "train.json").unlink()
    code, out, _ = clipyard("list", run)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["step", "epoch", "samples", "size", "age", "format", "start", "tags", "state"]
    assert "good" in lines[1]
    assert "DAMAGED" in lines[1]
    assert "train.json is missing" in lines[1]
    assert lines[2].split()[:3] == ["20", "1", "1,280"]
    assert "best(top1 0.5)" in lines[2]
    assert lines[2].endswith("complete")
    assert "suspect" in lines[3]


def test_a_list_that_reads_everything_finds_a_flipped_bit(run: Path, clipyard: Command) -> None:
    damage(run / "checkpoints" / "step_00000020" / "model.safetensors")
    assert "DAMAGED" not in clipyard("list", run)[1]
    out = clipyard("list", run / "checkpoints", "--verify")[1].splitlines()
    assert "DAMAGED: model.safetensors: sha256" in out[2]
    assert out[1].endswith("verified")


def test_verify_names_every_damaged_file_and_fails(run: Path, clipyard: Command) -> None:
    assert clipyard("verify", run) == (0, "step 10: whole\nstep 20: whole\nstep 30: whole\n", "")
    for name in ("model.safetensors", "optimizer.safetensors"):
        damage(run / "checkpoints" / "step_00000020" / name)
    code, out, _ = clipyard("verify", run)
    assert code == 1
    assert "step 20: DAMAGED\n  model.safetensors: sha256" in out
    assert "  optimizer.safetensors: sha256" in out
    assert clipyard("verify", run, "--step", 10)[0] == 0
    (run / "checkpoints" / "step_00000030" / "MANIFEST.json").write_text("{")
    assert "has no readable MANIFEST.json" in clipyard("verify", run, "--step", 30)[1]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip_loads_an_exported_file(
    run: Path, model_file: Path, clipyard: Command, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / "out" / f"weights{suffix}"
    code, text, _ = clipyard("export", run, out)  # 30 is suspect
    assert (code, text) == (0, f"step 20 of run -> {out}\n")
    open_clip.add_model_config(str(model_file))
    model = open_clip.create_model(model_file.stem, pretrained=str(out))
    assert_equal(dict(model.state_dict()), weights_of(model_file, 20))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_open_clip_loads_an_exported_directory_without_knowing_the_model(
    run: Path, model_file: Path, clipyard: Command, tmp_path: Path
) -> None:
    assert clipyard("export", run, tmp_path / "hub", "--step", 10)[0] == 0
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'hub'}")
    assert_equal(dict(model.state_dict()), weights_of(model_file, 10))
    assert "size=32" in str(preprocess)


def test_settings_of_the_run_are_in_an_exported_directory(model_file: Path, clipyard: Command, tmp_path: Path) -> None:
    forced = {"force_context_length": 9, "image_mean": [0.5, 0.5, 0.5], "image_resize_mode": "squash", "siglip": True}
    Checkpointer(tmp_path / "run").save(1, content(model_file, 1, **forced))
    assert clipyard("export", tmp_path / "run", tmp_path / "hub")[0] == 0
    config = json.loads((tmp_path / "hub" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["context_length"] == 9
    assert config["model_cfg"]["init_logit_bias"] == -10.0
    assert config["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["preprocess_cfg"]["resize_mode"] == "squash"


def test_best_is_what_is_tagged_so(run: Path, model_file: Path, clipyard: Command, tmp_path: Path) -> None:
    assert clipyard("export", run, tmp_path / "w.safetensors", "--step", "best")[0] == 0
    assert_equal(load_file(tmp_path / "w.safetensors"), weights_of(model_file, 20))
    Checkpointer(run / "checkpoints").change_tags(lambda _: Tags())
    code, _, err = clipyard("export", run, tmp_path / "w.safetensors", "--step", "best")
    assert code == 2
    assert "no checkpoint is tagged best" in err


def test_an_export_with_the_optimizer_is_what_open_clip_resumes_from(
    run: Path, clipyard: Command, tmp_path: Path
) -> None:
    assert clipyard("export", run, tmp_path / "epoch.pt", "--with-optimizer")[0] == 0
    found = torch.load(tmp_path / "epoch.pt", weights_only=True)
    assert found["epoch"] == 1
    assert len(found["optimizer"]["state"]) == len(found["state_dict"])


def test_the_average_is_the_mean_by_hand_and_loads_in_open_clip(
    run: Path, model_file: Path, clipyard: Command, tmp_path: Path
) -> None:
    out = tmp_path / "soup.pt"
    assert clipyard("average", run, out, "--last", 2)[1] == f"mean of step 10, step 20 of run -> {out}\n"
    parts = [weights_of(model_file, step) for step in (10, 20)]
    expected = {name: ((parts[0][name].double() + parts[1][name].double()) / 2).float() for name in parts[0]}
    open_clip.add_model_config(str(model_file))
    model = open_clip.create_model(model_file.stem, pretrained=str(out))
    assert_equal(dict(model.state_dict()), expected)
    assert clipyard("average", run, tmp_path / "soup.safetensors", "--steps", "10,20,30")[0] == 0


def test_a_run_of_the_first_format_is_read(run: Path, model_file: Path, clipyard: Command, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step_00000020"
    save_file(load_file(step / "model.safetensors"), step / "model.safetensors")  # as that version wrote it
    files = {path.name: path.read_bytes() for path in step.iterdir() if path.name != "MANIFEST.json"}
    facts = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (step / "MANIFEST.json").write_text(json.dumps({"format": 1, "step": 20, "files": facts}))
    row = clipyard("list", run, "--verify")[1].splitlines()[2]
    assert row.endswith("verified")
    assert row.split()[7:9] == ["1", "-"]
    assert clipyard("export", run, tmp_path / "w.safetensors", "--step", 20)[0] == 0
    assert_equal(load_file(tmp_path / "w.safetensors"), weights_of(model_file, 20))


def test_a_mirrored_run_is_listed_verified_and_exported(
    run: Path, model_file: Path, clipyard: Command, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/away/run"
    assert clipyard("mirror", run, url)[0] == 0
    assert "0 files" in clipyard("mirror", run, url)[1]
    lines = clipyard("list", url)[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"]
    assert lines[2].endswith("complete")
    assert clipyard("verify", url) == (0, "step 10: whole\nstep 20: whole\nstep 30: whole\n", "")
    assert clipyard("export", url, tmp_path / "w.safetensors")[0] == 0
    assert_equal(load_file(tmp_path / "w.safetensors"), weights_of(model_file, 20))
    away = tmp_path / "away" / "run" / "checkpoints"
    damage(away / "step_00000020" / "model.safetensors")
    (away / "step_00000010" / "MANIFEST.json").unlink()
    code, out, _ = clipyard("verify", url)
    assert code == 1
    assert "step 20: DAMAGED\n  model.safetensors: sha256" in out
    assert "step 10: DAMAGED" in out
    assert clipyard("export", url, tmp_path / "x.pt", "--step", 20)[0] == 1


def test_a_mirror_that_is_not_complete_is_said_so(run: Path, clipyard: Command, tmp_path: Path) -> None:
    damage(run / "checkpoints" / "step_00000020" / "model.safetensors")
    code, _, err = clipyard("mirror", run, f"file://{tmp_path}/away/run")
    assert code == 1
    assert "not complete: files that could not be read here were left out" in err


_OWNER = """
import sys
from pathlib import Path
from training.resilience.lease import claim_lease
claim_lease(Path(sys.argv[1]) / "leases", take_over=False)
print("owner", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(run: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that trains the run."""
    command = [sys.executable, "-c", _OWNER, str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "owner\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_that_goes_on_keeps_its_own_mirror(
    run: Path, owner: subprocess.Popen[str], clipyard: Command, tmp_path: Path
) -> None:
    own = Mirror(run, open_store(f"file://{tmp_path}/away/run"))
    own.check(continues=True)
    code, _, err = clipyard("mirror", run, f"file://{tmp_path}/away/run")
    assert code == 2
    assert f"is in use by process {owner.pid}" in err
    assert own.upload_once()
    owner.communicate("")
    assert clipyard("mirror", run / "checkpoints", f"file://{tmp_path}/away/run")[0] == 0


def test_a_run_whose_end_cannot_be_seen_is_mirrored_when_told_so(run: Path, clipyard: Command, tmp_path: Path) -> None:
    (run / "leases").mkdir()
    (run / "leases" / "00000001.json").write_text("{")
    url = f"file://{tmp_path}/away/run"
    assert "whose lease" in clipyard("mirror", run, url)[2]
    assert clipyard("mirror", run, url, "--take-over")[0] == 0


def test_mirroring_by_hand_deletes_nothing(run: Path, clipyard: Command, tmp_path: Path) -> None:
    away = tmp_path / "away" / "run"
    unfinished = away / "checkpoints" / "step_00000005" / "model.safetensors"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"of an upload that was killed")
    (run / "checkpoints" / "epoch_1.pt").write_bytes(b"1")
    assert clipyard("mirror", run, f"file://{away}")[0] == 0
    (run / "checkpoints" / "epoch_1.pt").rename(run / "checkpoints" / "epoch_2.pt")
    Checkpointer(run / "checkpoints")._delete(run / "checkpoints" / "step_00000010")
    before = {path for path in away.rglob("*") if path.is_file()}
    for _ in range(2):
        assert clipyard("mirror", run, f"file://{away}")[0] == 0
    assert before <= {path for path in away.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["list", "{tmp}/none"], 2, "no step checkpoints in"),
        (["export", "{run}", "{tmp}/x.bin"], 2, "ends in '.bin'"),
        (["export", "{run}", "{tmp}/x.pt", "--step", "15"], 2, r"--step 15: there are [10, 20, 30]"),
        (["export", "{run}", "{tmp}/x.safetensors", "--with-optimizer"], 2, "only a .pt file"),
        (["average", "{run}", "{tmp}/x.pt", "--last", "3"], 2, "2 checkpoints are complete and not suspect"),
        (["average", "{run}", "{tmp}/x.pt", "--steps", "10"], 2, "1 checkpoints are no average"),
        (["mirror", "{run}", "{tmp}/x", "--protocol", "s3"], 2, "is no s3://BUCKET/PREFIX"),
        (["mirror", "file://{run}", "{tmp}/x"], 2, "is a mirror already"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run: Path, tmp_path: Path, clipyard: Command, words: list[str], code: int, message: str
) -> None:
    found, _, err = clipyard(*(word.format(run=run, tmp=tmp_path) for word in words))
    assert found == code
    assert message in err


def test_a_damaged_checkpoint_is_not_exported(run: Path, clipyard: Command, tmp_path: Path) -> None:
    damage(run / "checkpoints" / "step_00000020" / "model.safetensors")
    code, _, err = clipyard("export", run, tmp_path / "x.pt")
    assert code == 1
    assert "model.safetensors was written as" in err
    assert not (tmp_path / "x.pt").exists()


def test_a_directory_needs_the_model_file(run: Path, model_file: Path, clipyard: Command, tmp_path: Path) -> None:
    model_file.unlink()
    code, _, err = clipyard("export", run, tmp_path / "hub")
    assert code == 2
    assert "Export to .pt or .safetensors" in err
