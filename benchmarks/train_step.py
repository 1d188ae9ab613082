"""Samples/s, MFU and peak memory of our train step and of OpenCLIP's, in one run on the same weights and batches.

    python -m benchmarks.train_step --model ViT-B-32 --batch-size 32 --precision fp32 --device cpu
    python -m benchmarks.train_step --model ViT-B-32 --batch-size 896 --precision amp_bf16 -- --torchcompile
    torchrun --nproc-per-node 2 -m benchmarks.train_step ...      both arms over the same ranks

    ceiling -> for each rival: same weights -> gradients -> first losses -> warm-up -> blocks A B B A ... -> all losses
            -> JSON after every rival

What follows ``--`` are flags of a run, for our arm. Compute only: normalised images and packed captions lie on the
device before the clock starts, as a run's prefetching leaves them there. See docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.batches import HostBatch, describe_captions, make_batches, real_lengths
from benchmarks.gradient_error import exact_matmul
from benchmarks.memory import held_gib, peak_gib, reset_peak, resident_gib
from benchmarks.mfu import data_sheet_mfu, measure_ceiling, utilisation
from benchmarks.open_clip_checkout import describe_open_clip, open_clip_label, use_open_clip_checkout
from benchmarks.parity import check_gradients, check_losses, check_timed_form, compare_curves
from benchmarks.provenance import ROOT, describe_run, device_label, slug
from benchmarks.timing import Arm, Deadline, Times, alternate, speed_ratio, spread, time_block
from benchmarks.train_step_arms import (
    RIVALS,
    ArmSettings,
    ClipyardArm,
    OpenClipArm,
    StepArm,
)
from benchmarks.training_flops import training_flops_per_sample
from models.factory import create_model
from models.packing import PackedTexts
from training.assembly import seed_all, set_device_defaults
from training.config import EngineConfig
from training.data.batch import DeviceBatch
from training.distributed.collectives import broadcast_object, gather_objects
from training.distributed.runtime import Runtime, close_runtime, start_runtime
from training.precision import build_precision

RESULTS = ROOT / "benchmarks" / "results"
OURS = ClipyardArm.name
Result = dict[str, Any]
logger = logging.getLogger("benchmarks.train_step")
# By device: the defaults of what is not given.
_ON_CUDA = {"blocks": 10, "block_steps": 20, "warmup_steps": 30, "rewarm_steps": 2, "batches": 4, "least_steps": 30}
_ELSEWHERE = {"blocks": 10, "block_steps": 1, "warmup_steps": 1, "rewarm_steps": 0, "batches": 4, "least_steps": 2}


class ArmOutOfMemory(RuntimeError):
    """One of the arms does not fit."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="a name, or a model's .json file")
    parser.add_argument("--batch-size", type=int, default=32, help="per rank")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16", "bf16", "pure_bf16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rivals", nargs="*", default=["open_clip"], choices=tuple(RIVALS))
    parser.add_argument("--blocks", type=int, help="timed blocks per arm (10)")
    parser.add_argument("--block-steps", type=int, help="timed steps per block (20 on CUDA, 1 elsewhere)")
    parser.add_argument("--warmup-steps", type=int, help="untimed steps per arm at the start (30 on CUDA, 1 elsewhere)")
    parser.add_argument("--rewarm-steps", type=int, help="untimed steps per block (2 on CUDA, 0 elsewhere)")
    parser.add_argument("--parity-steps", type=int, default=2, help="steps whose losses must agree first")
    parser.add_argument("--batches", type=int, help="different batches, used in turn (4)")
    parser.add_argument("--lr", type=float, default=5e-5, help="small: random pairs teach nothing, they only diverge")
    parser.add_argument("--full-length", action="store_true", help="every caption as long as the context")
    parser.add_argument("--grad-checkpointing", action="store_true", help="in both arms")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--time-limit-s", type=float, help="end early, with --least-steps measured")
    parser.add_argument("--least-steps", type=int, help="timed however late it is (30 on CUDA, 2 elsewhere)")
    parser.add_argument("--no-memory", action="store_true", help="on the CPU: no processes that measure memory")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/NAME.json)")
    parser.add_argument("--memory-of", choices=(OURS, *RIVALS), help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parsed = parser.parse_args(own)
    parsed.flags = flags
    defaults = _ON_CUDA if torch.device(parsed.device).type == "cuda" else _ELSEWHERE
    for name, value in defaults.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole benchmark, or, in a child process, measure the memory of one arm."""
    started = time.monotonic()
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    use_open_clip_checkout(arguments.open_clip_path, may_restart=argv is None)
    runtime = start_runtime(EngineConfig(device=arguments.device))
    logging.getLogger("benchmarks").setLevel(logging.INFO if runtime.is_main else logging.WARNING)
    seed_all(0)
    set_device_defaults(runtime.device)  # OpenCLIP's trainer sets the same
    if arguments.memory_of:
        sys.stdout.write(json.dumps(measure_memory(arguments, runtime)) + "\n")
        return 0
    deadline = Deadline(arguments.time_limit_s, started=started, agree=broadcast_object)
    path = arguments.out or RESULTS / f"{result_name(arguments, world_size=runtime.world_size)}.json"

    def write(result: Result) -> None:
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")

    result = Measurement(arguments, runtime=runtime, deadline=deadline).run(write)
    logger.info("%s", summary(result))
    close_runtime(runtime)
    return 1 if any("void" in comparison for comparison in result["comparisons"].values()) else 0


def settings_of(arguments: argparse.Namespace) -> ArmSettings:
    """The part of the command line that both arms are built from."""
    return ArmSettings(
        model=arguments.model,
        precision=arguments.precision,
        device=torch.device(arguments.device),
        grad_checkpointing=arguments.grad_checkpointing,
        lr=arguments.lr,
    )


def flags_of(arguments: argparse.Namespace) -> list[str]:
    """Of a run, for our arm."""
    return [f"--batch-size={arguments.batch_size}", *arguments.flags]


class Lane:
    """An arm with its batches on the device, and the losses of all its steps."""

    def __init__(self, name: str, arm: StepArm, batches: Sequence[HostBatch]) -> None:
        self.name = name
        self.arm = arm
        self.batches = arm.prepare(batches)
        self.losses: list[Tensor] = []
        self.peak_gib: float | None = None

    def take(self, number: int) -> DeviceBatch:
        """The batch of a step."""
        return self.batches[number % len(self.batches)]

    def step(self, batch: DeviceBatch) -> None:
        """One optimizer step.

        Raises:
            ArmOutOfMemory: it does not fit on the device.
        """
        try:
            self.losses.append(self.arm.step(batch))
        except torch.OutOfMemoryError as error:
            raise ArmOutOfMemory(self.name, str(error).split(". ")[0]) from None

    def run(self, steps: int, *, first: int) -> None:
        """Steps that nobody times."""
        for number in range(first, first + steps):
            self.step(self.take(number))

    def loss_values(self) -> list[float]:
        """Of every step so far."""
        return cast("list[float]", torch.stack(self.losses).double().tolist())  # host sync


class Measurement:
    """Everything that goes into the result file."""

    def __init__(self, arguments: argparse.Namespace, *, runtime: Runtime, deadline: Deadline) -> None:
        self._arguments = arguments
        self._runtime = runtime
        self._deadline = deadline
        self._run = describe_run(runtime.device)
        self._host = load_batches(arguments, seed=runtime.rank)
        self._ceiling = measure_ceiling(runtime.device, computed_dtype(arguments.precision, runtime.device))
        self._flops = training_flops_per_sample(arguments.model, real_lengths(self._host))
        logger.info("ceiling: %.4g TFLOP/s; %.4g useful GFLOP a pair", self._ceiling.tflops, self._flops.useful / 1e9)

    def run(self, write: Callable[[Result], None]) -> Result:
        """Ours against each rival in turn; written after the gates and every round of blocks, whatever ends it."""
        settings, runtime = settings_of(self._arguments), self._runtime
        ours = Lane(OURS, ClipyardArm(settings, flags=flags_of(self._arguments), runtime=runtime), self._host)
        weights = {name: value.detach().clone() for name, value in ours.arm.model.state_dict().items()}
        result = self._heading(ours)
        last = 0.0  # seconds that a rival took: the next needs about as many
        for name in self._arguments.rivals:
            began = time.monotonic()
            if not self._deadline.allows(last):
                logger.info("no time for %s", name)
                result["comparisons"][name] = {"unfinished": "no time was left for it"}
                continue

            def keep(comparison: Result, name: str = name) -> None:
                write({**result, "comparisons": {**result["comparisons"], name: comparison}})

            result["comparisons"][name] = self._compare(name, ours, weights, keep)
            release_memory(runtime.device)
            write(result)
            last = time.monotonic() - began
        if not any(OURS in comparison.get("arms", {}) for comparison in result["comparisons"].values()):
            result["alone"] = self._measure_alone(ours)
            write(result)
        if runtime.device.type != "cuda" and not self._arguments.no_memory:
            del ours, weights
            result["memory"] = {
                name: memory_of_child(name, self._arguments) for name in (OURS, *self._arguments.rivals)
            }
            write(result)
        return result

    def _heading(self, ours: Lane) -> Result:
        real = sum(real_lengths(self._host))
        computed = sum(text_tokens(batch) for batch in ours.batches)
        padded = sum(batch.texts.numel() for batch in self._host)
        return {
            "benchmark": "train_step",
            "settings": settings_as_json(self._arguments),
            "world_size": self._runtime.world_size,
            "guard": ours.arm.config.resilience.guard if isinstance(ours.arm, ClipyardArm) else "off",
            "caption_tokens": describe_captions(self._host),
            "text_tokens": {
                **{"real": real, "computed": computed, "padded": padded},
                "saved_pct": 100 * (1 - computed / padded),
            },
            "run": self._run,
            "ceiling_tflops": self._ceiling.tflops,
            "ceiling": self._ceiling._asdict(),
            "useful_gflops_per_sample": self._flops.useful / 1e9,
            "computed_gflops_per_sample": self._flops.computed / 1e9,
            "padded_gflops_per_sample": self._flops.padded / 1e9,
            "comparisons": {},
        }

    def _compare(self, name: str, ours: Lane, weights: Mapping[str, Tensor], keep: Callable[[Result], None]) -> Result:
        """One rival: gates and times, or why there are none."""
        logger.info("clipyard against %s", name)
        try:
            theirs = self._build_rival(name)
            restart(ours, weights)
            theirs.arm.model.load_state_dict(weights, strict=True)
            return self._measure(ours, theirs, keep)
        except ArmOutOfMemory as error:
            if error.name == OURS or self._runtime.world_size > 1:
                raise
            logger.info("%s runs out of memory: %s", error.name, error.reason)
            return {"out_of_memory": {error.name: error.reason}}

    def _build_rival(self, name: str) -> Lane:
        try:
            arm = OpenClipArm(settings_of(self._arguments), tuning=RIVALS[name], runtime=self._runtime)
            return Lane(name, arm, self._host)
        except torch.OutOfMemoryError as error:
            raise ArmOutOfMemory(name, str(error).split(". ")[0]) from None

    def _measure(self, ours: Lane, theirs: Lane, keep: Callable[[Result], None]) -> Result:
        try:
            parity = self._pass_gate(ours, theirs)
        except RuntimeError as error:
            if isinstance(error, ArmOutOfMemory) or self._runtime.world_size > 1:
                raise
            logger.error("void: %s", error)
            return {"void": str(error)}
        keep({"parity": parity, "unfinished": "ended before two blocks were measured"})
        lanes = {OURS: ours, theirs.name: theirs}
        times = self._measure_times(lanes, lambda times: keep(self._conclude(parity, ours, theirs, times)))
        return self._conclude(parity, ours, theirs, times)

    def _conclude(self, parity: Result, ours: Lane, theirs: Lane, times: Mapping[str, Times]) -> Result:
        """What may be said about the blocks so far. Collective: all ranks."""
        curves = compare_curves(
            *(ours.loss_values(), theirs.loss_values()),
            precision=self._arguments.precision,
            skipped_steps=ours.arm.skipped_steps(),
        )
        result: Result = {
            "parity": parity,
            "losses": {**curves._asdict(), "holds": curves.holds},
            "arms": {lane.name: self._describe(lane, times[lane.name]) for lane in (ours, theirs)},
            "step_times_ms": {name: rounded(times[name].wall) for name in times},
        }
        if void := next(filter(None, gather_objects("" if curves.holds else f"losses drift apart: {curves}")), None):
            logger.error("void: %s", void)
            return {**result, "void": void}
        result["ratio"] = speed_ratio(times[OURS].wall, times[theirs.name].wall)._asdict()
        if self._runtime.device.type != "cuda":
            result["processor_time_ratio"] = speed_ratio(times[OURS].work, times[theirs.name].work)._asdict()
        return result

    def _pass_gate(self, ours: Lane, theirs: Lane) -> Result:
        """No timing counts unless both arms compute the same."""
        steps = self._arguments.parity_steps
        assert isinstance(theirs.arm, OpenClipArm)
        gradients = check_gradients(ours.arm, theirs.arm, self._host[0])
        timed_form = check_timed_form(ours.arm, theirs.arm, ours.take(0), theirs.take(0))
        seconds = " and ".join(f"{value:.1f} s" for value in timed_form.first_pass_s)
        logger.info("first pass of %s and %s, compilation included: %s", OURS, theirs.name, seconds)
        release_memory(self._runtime.device)
        # Compiled programs are made anew for other TF32 settings: only where the tolerance asks for it.
        with exact_matmul() if self._arguments.precision == "fp32" else nullcontext():
            for lane in (ours, theirs):
                lane.run(steps, first=0)
        parity = check_losses(
            *(ours.loss_values(), theirs.loss_values()),
            precision=self._arguments.precision,
            gradient_difference=gradients,
            timed_form=timed_form,
        )
        logger.info("parity: losses %.1e apart, gradients %s; %s", parity.loss_difference, gradients, timed_form)
        return {**parity._asdict(), "timed_form": timed_form.as_json()}

    def _measure_times(
        self, lanes: Mapping[str, Lane], keep: Callable[[dict[str, Times]], None] | None = None
    ) -> dict[str, Times]:
        arguments, device = self._arguments, self._runtime.device
        for lane in lanes.values():
            warm_up(lane, steps=max(1, arguments.warmup_steps), first=arguments.parity_steps, device=device)
        return alternate(
            {name: Arm(lane.take, lane.step) for name, lane in lanes.items()},
            blocks=arguments.blocks,
            block_steps=arguments.block_steps,
            rewarm_steps=arguments.rewarm_steps,
            device=device,
            least_blocks=-(-arguments.least_steps // arguments.block_steps),
            deadline=self._deadline,
            keep=keep,
        )

    def _measure_alone(self, ours: Lane) -> Result:
        """Where no rival was there to be compared with."""
        return {"arms": {OURS: self._describe(ours, self._measure_times({OURS: ours})[OURS])}}

    def _describe(self, lane: Lane, times: Times) -> Result:
        """Step time, samples/s of all ranks, and how much of the device one rank uses."""
        wall = spread(times.wall)
        per_rank = self._arguments.batch_size * 1000 / wall.median_ms
        used = utilisation(self._flops, samples_per_s=per_rank, ceiling=self._ceiling)
        described = {
            **wall._asdict(),
            "samples_per_s": per_rank * self._runtime.world_size,
            **used._asdict(),
        }
        device = self._runtime.device
        stated = data_sheet_mfu(
            self._flops,
            samples_per_s=per_rank,
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            dtype=computed_dtype(self._arguments.precision, device),
        )
        described |= {} if stated is None else {"mfu_data_sheet": stated}
        return described if lane.peak_gib is None else {**described, "peak_gib": lane.peak_gib}


def load_batches(arguments: argparse.Namespace, *, seed: int) -> list[HostBatch]:
    """On the host, as the model wants them."""
    built = create_model(arguments.model, device="meta")
    return make_batches(
        arguments.batches,
        batch_size=arguments.batch_size,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=arguments.full_length,
        seed=seed,
    )


def computed_dtype(precision: str, device: torch.device) -> torch.dtype:
    """In which type the towers multiply: that of the ceiling."""
    row = build_precision(precision, device)
    return row.autocast_dtype or row.weight_dtype


def text_tokens(batch: DeviceBatch) -> int:
    """Tokens that the text tower computes."""
    return (batch.texts.tokens if isinstance(batch.texts, PackedTexts) else batch.texts).numel()


def restart(ours: Lane, weights: Mapping[str, Tensor]) -> None:
    """As it was built: the next rival starts from there, too."""
    ours.arm.model.load_state_dict(weights, strict=True)
    assert isinstance(ours.arm, ClipyardArm)
    ours.arm.start()
    ours.losses.clear()


def warm_up(lane: Lane, *, steps: int, first: int, device: torch.device) -> None:
    """Compiles, fills caches, and on CUDA measures the memory of a step beside whatever else is there."""
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) / 2**30 - held_gib(lane.arm.model, lane.arm.optimizer, device)
        reset_peak(device)
    time_block(Arm(lane.take, lane.step), first_step=first, steps=steps, device=device)
    if device.type == "cuda":
        lane.peak_gib = peak_gib(device) - others


def release_memory(device: torch.device) -> None:
    """What an arm held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_memory(arguments: argparse.Namespace, runtime: Runtime) -> dict[str, float]:
    """Peak over two steps of one arm, alone in this process, in GiB."""
    name, settings = arguments.memory_of, settings_of(arguments)
    arm: StepArm = (
        ClipyardArm(settings, flags=flags_of(arguments), runtime=runtime)
        if name == OURS
        else OpenClipArm(settings, tuning=RIVALS[name], runtime=runtime)
    )
    lane = Lane(name, arm, load_batches(arguments, seed=0))
    before = resident_gib()
    reset_peak(runtime.device)
    lane.run(2, first=0)
    return {"peak_gib": peak_gib(runtime.device), "resident_before_steps_gib": before}


def memory_of_child(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The same settings in a process of its own, which measures only the memory of one arm."""
    told = ("model", "batch_size", "precision", "device", "full_length", "grad_checkpointing", "open_clip_path")
    options = [
        f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')}={value}"
        for key, value in ((key, getattr(arguments, key)) for key in told)
        if value not in (None, False)
    ]
    own = (*options, "--batches=1", f"--memory-of={name}", "--", *arguments.flags)
    command = (sys.executable, "-m", "benchmarks.train_step", *own)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return cast("dict[str, float]", json.loads(done.stdout.splitlines()[-1]))


def rounded(blocks: Sequence[Sequence[float]]) -> list[list[float]]:
    """Milliseconds, for people and for the size of the file."""
    return [[round(ms, 3) for ms in block] for block in blocks]


def settings_as_json(arguments: argparse.Namespace) -> dict[str, object]:
    """The command line with defaults filled in; of paths only the last part."""
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "memory_of")}
    settings["model"] = model_label(arguments.model)
    return {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}


def model_label(model: str) -> str:
    """Its name, or that of its file."""
    return model.removesuffix(".json").rpartition("/")[2] if model.endswith(".json") else model


def result_name(arguments: argparse.Namespace, *, world_size: int = 1) -> str:
    """File name of a result: what distinguishes one measurement from the next."""
    device = device_label(torch.device(arguments.device))
    parts = ["train_step", model_label(arguments.model).replace("/", "-"), device, arguments.precision]
    parts.append(f"b{arguments.batch_size}")
    parts += ["full_length"] if arguments.full_length else []
    parts += ["grad_checkpointing"] if arguments.grad_checkpointing else []
    parts += [f"{world_size}_ranks"] if world_size > 1 else []
    parts += [slug(word) for word in arguments.flags]
    # What has the default arm in it is the main result; beside it lies what was measured later.
    parts += ["_".join(arguments.rivals).replace("open_clip_", "")] if "open_clip" not in arguments.rivals else []
    parts += [f"openclip-{open_clip_label({'open_clip': describe_open_clip()})}"] if arguments.rivals else []
    return "_".join(filter(None, parts))


def summary(result: Result) -> str:
    """What a person wants to read in a log."""
    tokens = result["text_tokens"]
    lines = [f"{result['settings']['model']}: {tokens['saved_pct']:.1f} % of the text tokens are not computed"]
    for rival, comparison in result["comparisons"].items():
        for name, arm in comparison.get("arms", {}).items():
            lines.append(
                f"{name:24s} {arm['samples_per_s']:9.4g} samples/s  step {arm['median_ms']:.1f} ms "
                f"[{arm['q25_ms']:.1f}, {arm['q75_ms']:.1f}]  MFU {100 * arm['mfu_useful']:.1f} %"
            )
        for key, meaning in (("ratio", "wall clock"), ("processor_time_ratio", "processor time")):
            if ratio := comparison.get(key):
                span = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                lines.append(f"clipyard is {ratio['value']:.3f} {span} times as fast as {rival}, by {meaning}")
        lines += [
            f"{rival}: {key}: {comparison[key]}" for key in ("void", "out_of_memory", "unfinished") if key in comparison
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
