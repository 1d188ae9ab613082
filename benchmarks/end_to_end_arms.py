"""One program that trains, in a process of its own, and measures itself: ``python -m benchmarks.end_to_end_arms NAME``.

stdin:  {"prepare": {...}}                      {"steps": 8, "rewarm": 2}                      {"memory": true}
stdout: {"gate_losses": [...], "versions": ..}  {"step_ms": [..], "wait_ms": [..], "cpu_s": ..}  {"peak_gib": ..}

clipyard    TrainLoader -> load_to_device (packing, uint8 over the bus, prefetch) -> TrainStep: a run's own builders
open_clip   its WebLoader -> fp32 images .to(device), as its trainer does -> its step
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.batches import HostBatch
from benchmarks.gradient_error import exact_matmul
from benchmarks.memory import peak_gib, reset_peak
from benchmarks.open_clip_checkout import use_open_clip_checkout
from benchmarks.process_meter import memory, process_tree, usage
from benchmarks.provenance import model_name
from benchmarks.train_step_arms import (
    ArmSettings,
    ClipyardArm,
    OpenClipArm,
    Tuning,
    single_process,
)
from models.factory import create_model
from training.assembly import build_loader, seed_all, set_device_defaults
from training.data.batch import DeviceBatch
from training.observability.console import ProgressLine
from training.run import Run


class Preparation(NamedTuple):
    """What an arm is made from."""

    flags: Sequence[str]
    """Of a training run: data, batch size, workers. The same for both programs."""
    model: str
    precision: str
    device: str
    weights: str
    """File that both start from; ours writes it."""
    gate: str
    """File with a ``HostBatch`` that both are fed."""
    gate_steps: int
    lr: float
    own_flags: Sequence[str] = ()
    """Of ours alone."""
    grad_checkpointing: bool = False
    tune_open_clip: bool = False
    open_clip_path: str | None = None


class LoadedArm(Protocol):
    """A model with its loader and its optimizer."""

    def batches(self) -> Iterator[DeviceBatch]:
        """The loader's batches, on the device, for ever."""

    def given(self, batch: HostBatch) -> DeviceBatch:
        """A batch that no loader made, as the step takes it."""

    def step(self, batch: DeviceBatch) -> Tensor:
        """One optimizer step; the loss stays on the device."""


class ClipyardRun:
    """A training run of ours, without what surrounds its steps: logs, checkpoints, evaluation."""

    def __init__(self, preparation: Preparation) -> None:
        settings = _settings(preparation)
        set_device_defaults(settings.device)
        seed_all(0)
        self._arm = ClipyardArm(settings, flags=[*preparation.flags, *preparation.own_flags])
        torch.save(self._arm.model.state_dict(), preparation.weights)
        run = Run(
            config=self._arm.config,
            runtime=single_process(settings.device),
            name="end-to-end",
            paths=None,
            progress=ProgressLine(sys.stderr),
            lease=None,
            after_signal=False,
        )
        built = create_model(settings.model, device="meta")
        self._loader = build_loader(run, built, epoch_batch=run.config.data.batch_size)

    def batches(self) -> Iterator[DeviceBatch]:
        return self._arm._load(iter(self._loader))

    def given(self, batch: HostBatch) -> DeviceBatch:
        return self._arm.prepare([batch])[0]

    def step(self, batch: DeviceBatch) -> Tensor:
        loss = self._arm.step(batch)
        if batch.record is not None and batch.record.positions:  # none of a batch that was given
            self._loader.commit(batch.record)
        return loss


class OpenClipRun:
    """OpenCLIP's data pipeline with its defaults in front of its step."""

    def __init__(self, preparation: Preparation) -> None:
        path = preparation.open_clip_path
        use_open_clip_checkout(Path(path) if path else None, may_restart=False)
        from open_clip import get_input_dtype
        from open_clip.factory import get_tokenizer
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from open_clip_train import data
        from open_clip_train.params import parse_args

        settings = _settings(preparation)
        name = model_name(settings.model)
        args: Any = parse_args(["--model", name, *preparation.flags])
        args.distributed, args.world_size, args.rank = False, 1, 0
        set_device_defaults(settings.device)  # as its own trainer does
        self._arm = OpenClipArm(settings, tuning=Tuning(compiled=preparation.tune_open_clip))
        weights = torch.load(preparation.weights, map_location=settings.device, weights_only=True)
        self._arm.model.load_state_dict(weights, strict=True)
        visual: Any = self._arm.model.get_submodule("visual")
        transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=True, aug_cfg=args.aug_cfg)
        _accept_marks_of_ends(data)
        self._data = data.get_wds_dataset(args, transform, is_train=True, epoch=0, tokenizer=get_tokenizer(name))
        self._device, self._dtype = settings.device, get_input_dtype(settings.precision)

    def batches(self) -> Iterator[DeviceBatch]:
        for images, texts in self._data.dataloader:
            images = images.to(device=self._device, dtype=self._dtype, non_blocking=True)
            yield DeviceBatch(images, texts.to(device=self._device, non_blocking=True))

    def given(self, batch: HostBatch) -> DeviceBatch:
        return self._arm.prepare([batch])[0]

    def step(self, batch: DeviceBatch) -> Tensor:
        return self._arm.step(batch)


def _accept_marks_of_ends(data: Any) -> None:
    """Newer webdatasets than OpenCLIP asks for mark the end of each shard, on which its loader ends; not so here."""
    if "eof_value" in inspect.signature(data.tar_file_expander).parameters:
        data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)


def _settings(preparation: Preparation) -> ArmSettings:
    return ArmSettings(
        model=preparation.model,
        precision=preparation.precision,
        device=torch.device(preparation.device),
        grad_checkpointing=preparation.grad_checkpointing,
        lr=preparation.lr,
    )


ARMS: dict[str, Callable[[Preparation], LoadedArm]] = {"clipyard": ClipyardRun, "open_clip": OpenClipRun}


def gate_losses(arm: LoadedArm, path: str, *, steps: int) -> list[float]:
    """Losses of a few steps on one given batch, with exact products: what both arms must agree on."""
    batch = HostBatch(*torch.load(path, weights_only=True))
    with exact_matmul():
        return [arm.step(arm.given(batch)).item() for _ in range(steps)]  # host sync


def measure(
    step: Callable[[DeviceBatch], object],
    batches: Iterator[DeviceBatch],
    *,
    steps: int,
    rewarm: int,
    device: torch.device,
) -> dict[str, Any]:
    """Times from the end of one step to the end of the next; how much of them passed before the batch was there.

    On CUDA both are times of the device: it waits for data only if the host has not run ahead far enough to hide that.
    What is copied on the stream of the step counts as waiting, what is copied beside it does not.
    """
    for _ in range(rewarm):
        step(next(batches))
    processes = process_tree(os.getpid())
    before = usage(processes)
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    waited_s = 0.0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - start
        clock.begin()
        step(batch)
        clock.end()
    wait_ms, step_ms = clock.read()
    return {
        "step_ms": [round(value, 3) for value in step_ms],
        "wait_ms": [round(value, 3) for value in wait_ms],
        "host_wait_ms": round(1000 * waited_s, 3),
        "cpu_s": round(usage(processes).cpu_s - before.cpu_s, 3),
    }


class _HostClock:
    """Wall clock: on a CPU a step is done when its call returns."""

    def __init__(self) -> None:
        self._marks = [time.perf_counter()]

    def begin(self) -> None:
        self._marks.append(time.perf_counter())

    end = begin

    def read(self) -> tuple[list[float], list[float]]:
        """(waits, whole steps) in ms."""
        ends, begins = self._marks[::2], self._marks[1::2]
        waits = [1000 * (begin - end) for begin, end in zip(begins, ends, strict=False)]
        return waits, [1000 * (end - before) for before, end in zip(ends, ends[1:], strict=False)]


class _CudaClock:
    """Events on the step's stream, and one host sync for all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)  # host sync
        self._marks: list[torch.cuda.Event] = []
        self.begin()

    def begin(self) -> None:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append(mark)

    end = begin

    def read(self) -> tuple[list[float], list[float]]:
        """(waits, whole steps) in ms."""
        torch.cuda.synchronize(self._device)  # host sync
        ends, begins = self._marks[::2], self._marks[1::2]
        waits = [end.elapsed_time(begin) for begin, end in zip(begins, ends, strict=False)]
        return waits, [before.elapsed_time(end) for before, end in zip(ends, ends[1:], strict=False)]


def measure_memory(device: torch.device) -> dict[str, float]:
    """Peak of this process since the gate, and what all processes of the arm hold now."""
    everything = process_tree(os.getpid())
    loaders = [pid for pid in everything if pid != os.getpid()]
    reserved = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0
    return {
        "peak_gib": round(peak_gib(device), 3),
        "peak_reserved_gib": round(reserved, 3),
        "loader_pss_mb": memory(loaders).pss_mb,
    }


def main(name: str) -> None:
    """Serves requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    requests = (json.loads(line) for line in sys.stdin)
    preparation = Preparation(**next(requests)["prepare"])
    device = torch.device(preparation.device)
    arm = ARMS[name](preparation)
    losses = gate_losses(arm, preparation.gate, steps=preparation.gate_steps)
    reset_peak(device)
    batches = arm.batches()
    batches = chain([next(batches)], batches)  # the loader runs from here on
    answers.write(json.dumps({"gate_losses": losses, "versions": _versions()}) + "\n")
    for request in requests:
        is_last = "memory" in request
        answer = measure_memory(device) if is_last else measure(arm.step, batches, device=device, **request)
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # loader processes may be stopped: nothing to wait for


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "open_clip_torch", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    webdataset = sys.modules.get("webdataset")
    return found | {"webdataset": getattr(webdataset, "__version__", None)}


if __name__ == "__main__":
    main(sys.argv[1])
