"""``--decode gpu``, on the CPU: a run that is killed ends with the samples and the weights of one that was not."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.images import encode, render
from tests.data.test_device_decode import undecodable_jpeg
from tests.end_to_end.conftest import Outcome, start_ranks
from tests.factories import write_tar
from training.checkpoint.checkpointer import Checkpointer
from training.commands.data_trace import trace_step
from training.data import device_decode
from training.data.trace import read_trace
from training.resilience.exit_codes import BAD_USAGE

Run = Callable[[Sequence[str]], Outcome]


def _line(tmp_path: Path, model: str, name: str) -> list[str]:
    flags = (
        "--precision fp32 --device cpu --epochs 1 --batch-size 4 --workers 1 --warmup 2 --lr 1e-3 --decode gpu "
        "--aug-cfg scale=(0.4,1.0) gray_scale_prob=0.2 --trace-samples --log-every-n-steps 1 --save-every-n-steps 2 "
        "--log-metric-every-n-steps 4 --save-most-recent --resume latest --keep-checkpoints 20"
    )
    paths = ("--train-data", str(tmp_path / "0.tar"), "--logs", str(tmp_path / "logs"))
    return [*flags.split(), *paths, "--train-num-samples", "40", "--model", model, "--name", name]


def _kill_when_saved(argv: Sequence[str], run: Path, *, step: int) -> None:
    (process,) = start_ranks(argv, world_size=1)
    deadline = time.monotonic() + 90
    while max(Checkpointer(run / "checkpoints").steps(), default=0) < step and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Photos of all kinds; one looks whole and is not."""
    files = [encode(render(90, 80, seed=i), **{"progressive": i % 5 == 0}) for i in range(40)]
    files[7] = undecodable_jpeg()
    samples = [(f"{i:03d}", {"jpg": data, "txt": f"a photo of {i}".encode()}) for i, data in enumerate(files)]
    return write_tar(tmp_path / "0.tar", samples)


def test_a_killed_run_ends_with_the_samples_and_weights_of_an_uninterrupted_one(
    run_here: Run, tmp_path: Path, tiny_model: str, shard: Path
) -> None:
    runs = [tmp_path / "logs" / name for name in ("whole", "killed")]
    _kill_when_saved(_line(tmp_path, tiny_model, "killed"), runs[1], step=4)
    texts = []
    for run in runs:
        outcome = run_here(_line(tmp_path, tiny_model, run.name))
        assert outcome.code == 0, outcome.text
        texts.append(outcome.text)
    assert "Resumed from" in texts[1]
    assert f"of {shard} cannot be decoded: another was shown twice" in texts[0]
    traces = [read_trace(run / "trace")[0] for run in runs]
    assert traces[0].tolist() == traces[1].tolist()
    weights = [load_file(Checkpointer(run / "checkpoints").newest() / "model.safetensors") for run in runs]  # type: ignore[operator]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert len(trace_step(runs[1], 3)) == 4


def test_a_decoder_that_is_not_there_ends_the_run_before_its_first_step_in_one_line(
    run_here: Run, tmp_path: Path, tiny_model: str, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    device_decode.check_decoder.cache_clear()
    monkeypatch.setattr(device_decode, "_decode_jpegs", fail)
    outcome = run_here(_line(tmp_path, tiny_model, "run"))
    assert outcome.code == BAD_USAGE, outcome.text
    assert "--decode gpu: JPEGs cannot be decoded on cpu (decode_jpegs_cuda: torchvision not" in outcome.text
    assert "or pass --decode fast." in outcome.text
    assert "Traceback" not in outcome.text
