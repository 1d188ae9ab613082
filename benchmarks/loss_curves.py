"""Losses of training with everything on against everything off: the same numbers, but for rounding.

    python -m benchmarks.loss_curves         (CPU: some minutes on two quiet cores, and compiling; on CUDA one or two)

    same weights, same batches -> on | off | OpenCLIP | off, rows of every batch in another order -> JSON, SVG

    on     packed texts, last block where it is read, tiled loss, compiled blocks where a compiler is, fused AdamW
    off    padded texts, whole last block, the loss as in its definition, nothing compiled, AdamW parameter by parameter
    noise  ``off`` with the rows of every batch permuted: the same mathematics, other sums. How far apart these curves
           are, in bf16 also how far ``off`` is from itself in fp32, is how far rounding alone moves a curve: the band

Training is chaotic: a last bit grows to something that a plot shows. So what counts as equal is measured beside it.
Legend: B batch, L text tokens, E embedding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.batches import HostBatch
from benchmarks.curve_gradients import gradient_errors, gradient_statement, is_as_near
from benchmarks.curve_picture import Curve, Panel, draw
from benchmarks.gradient_error import exact_matmul
from benchmarks.open_clip_checkout import use_open_clip_checkout
from benchmarks.provenance import ROOT, describe_run, model_name
from benchmarks.scale_report import fill
from benchmarks.train_step_arms import ArmSettings, OpenClipArm
from models.factory import BuiltModel, create_model
from models.text_form import build_packer
from models.tokenizer import build_tokenizer
from models.transformer import Transformer
from training.assembly import set_device_defaults
from training.config import EngineConfig, LossConfig, OptimConfig
from training.data.batch import DeviceBatch, normalize
from training.data.demo_samples import DemoSpec, plan_sample
from training.data.demo_scenes import render
from training.distributed.collectives import GatheredRows
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.losses.build import build_loss
from training.losses.contrastive import Loss, at_least_float32
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.train_step import TrainStep

RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "loss_curves_{device}.svg"
PAGE = ROOT / "docs" / "benchmarks" / "loss_curves.md"
ON, OFF, OPEN_CLIP, NOISE = "everything on", "everything off", "OpenCLIP", "off, rows permuted"
COLORS = {ON: "#c0392b", OFF: "#1f5fa8", OPEN_CLIP: "#2e8b57", NOISE: "#999999"}
logger = logging.getLogger("benchmarks.loss_curves")

GRADIENT_BATCHES = 4
"""On which gradients are compared with fp64."""
TOLERANCE = 1.5
"""Times the band, which a few runs show only roughly."""

Step = Callable[[HostBatch, float], Tensor]
"""A batch on the host and a learning rate -> the loss, on the device."""


class Training(NamedTuple):
    """One arm at its start."""

    step: Step
    model: nn.Module


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="demo-vit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=3200, help="different pictures; seen again in another order")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "amp_bf16"], choices=("fp32", "amp_bf16"))
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=40, help="steps over which the learning rate rises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise-runs", type=int, default=2, help="runs of 'off' with rows in other orders")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="compile blocks of 'on'")
    parser.add_argument("--grad-checkpointing", action="store_true", help="selective, in 'on'")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--open-clip-path", type=Path, help="use this checkout of OpenCLIP")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loss_curves_DEVICE.json")
    parser.add_argument("--picture", type=Path, help="default: docs/images/loss_curves_DEVICE.svg")
    parser.add_argument("--write-page", action="store_true", help="only put all results into docs/benchmarks")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains all arms, writes numbers and picture; 1 if on and off are further apart than noise."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    if arguments.write_page:
        arguments.page.write_text(fill(arguments.page.read_text(), {"loss_curves": report_of_results(RESULTS)}))
        return 0
    use_open_clip_checkout(arguments.open_clip_path, may_restart=argv is None)
    result = measure(arguments)
    device = torch.device(arguments.device).type
    files = {
        arguments.out or RESULTS / f"loss_curves_{device}.json": json.dumps(result, indent=1) + "\n",
        arguments.picture or Path(str(PICTURE).format(device=device)): picture(result),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for part in result["precisions"].values():
        sys.stdout.write(f"{part['statement']}\n")
    return 0 if all(part["within_noise"] and part["gradients_as_near"] for part in result["precisions"].values()) else 1


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the result file."""
    run = describe_run(torch.device(arguments.device))  # before: the load is that of others
    set_device_defaults(torch.device(arguments.device))  # as a run does
    built = create_model(arguments.model, device="meta")
    data = draw_data(built, samples=arguments.samples, seed=arguments.seed)
    compiles = arguments.compile == "on" or (arguments.compile == "auto" and has_compiler(arguments.device))
    settings = {name: getattr(arguments, name) for name in ("steps", "batch_size", "samples", "lr", "warmup", "seed")}
    result: dict[str, Any] = {
        "benchmark": "loss_curves",
        "settings": {"model": model_name(arguments.model), **settings, "compiled": compiles},
        "run": run,
        "precisions": {},
    }
    for precision in arguments.precisions:
        losses, weights = {}, {}
        # With TF32 fp32 would have other rounding than the band's.
        with exact_matmul() if precision == "fp32" else nullcontext():
            for name in arm_names(arguments):
                losses[name], weights[name] = train(name, data, arguments, precision=precision, compiles=compiles)
        errors = gradients_of(weights[ON], data, arguments, precision=precision, compiles=compiles)
        exact = losses_of(result).get("fp32")
        comparison = compare(losses, exact)
        result["precisions"][precision] = {
            "statement": f"{statement(precision, comparison)}; {gradient_statement(errors, batches=GRADIENT_BATCHES)}",
            "gradient_error": errors,
            "gradients_as_near": is_as_near(errors, ours=ON, rival=OPEN_CLIP),
            "within_noise": comparison.within_noise,
            **comparison._asdict(),
            "losses": {name: [round(value, 7) for value in curve] for name, curve in losses.items()},
        }
    return result


def arm_names(arguments: argparse.Namespace) -> list[str]:
    """In the order in which they run; noise runs are numbered."""
    return [ON, OFF, OPEN_CLIP, *(f"{NOISE} {number + 1}" for number in range(arguments.noise_runs))]


def has_compiler(device: str) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler, on CUDA Triton beside it."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    if torch.device(device).type != "cuda":
        return compiler
    from torch.utils._triton import has_triton

    return compiler and bool(has_triton())


# Data.


def draw_data(built: BuiltModel, *, samples: int, seed: int) -> HostBatch:
    """Demo scenes as pixels, and their captions as tokens; straight from the painter, without JPEG."""
    height, width = built.preprocess.size
    assert height == width
    spec = DemoSpec(samples=max(samples, DemoSpec.shards), seed=seed, image_size=height)
    planned = [plan_sample(spec, "train", index) for index in range(samples)]
    pixels = np.stack([np.asarray(render(scene, image_size=height)) for scene, _ in planned])  # [N, H, W, 3]
    texts = build_tokenizer(built.config)([captions[0] for _, captions in planned])
    return HostBatch(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(texts))


def make_order(samples: int, *, steps: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """The rows of each step's batch: epochs in different orders, batches all full.

    Raises:
        ValueError: there are fewer samples than in a batch.
    """
    if samples < batch_size:
        raise ValueError(f"{samples} samples fill no batch of {batch_size}: raise --samples or lower --batch-size")
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        rows = torch.randperm(samples, generator=generator)
        for batch in rows[: samples // batch_size * batch_size].split(batch_size):
            if done < steps:
                yield batch
            done += 1


# Training.


def train(
    name: str, data: HostBatch, arguments: argparse.Namespace, *, precision: str, compiles: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of one arm, step by step, and its weights in the end."""
    torch.manual_seed(arguments.seed)
    start = time.monotonic()
    step, model = build_arm(name, arguments, precision=precision, compiles=compiles)
    shuffle = torch.Generator().manual_seed(int(name.rpartition(" ")[2])) if name.startswith(NOISE) else None
    order = make_order(len(data.images), steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed)
    losses = []
    for number, rows in enumerate(order):
        if shuffle is not None:
            rows = rows[torch.randperm(len(rows), generator=shuffle)]
        lr = arguments.lr * min(1.0, (number + 1) / max(1, arguments.warmup))
        losses.append(step(HostBatch(data.images[rows], data.texts[rows]), lr))
    curve: list[float] = torch.stack(losses).double().tolist()  # host sync
    logger.info("%s, %s: %.4f -> %.4f in %.0f s", precision, name, curve[0], curve[-1], time.monotonic() - start)
    return curve, dict(model.state_dict())


def gradients_of(
    weights: Mapping[str, Tensor], data: HostBatch, arguments: argparse.Namespace, *, precision: str, compiles: bool
) -> dict[str, dict[str, float]]:
    """Distances from fp64 on batches that the training had, at the weights that 'on' has reached."""
    order = make_order(
        len(data.images), steps=GRADIENT_BATCHES, batch_size=arguments.batch_size, seed=arguments.seed + 1
    )
    policy = ["--grad-checkpointing", "--grad-checkpointing-policy=selective"] if arguments.grad_checkpointing else []
    return gradient_errors(
        weights,
        [HostBatch(data.images[rows], data.texts[rows]) for rows in order],
        ArmSettings(model=arguments.model, precision=precision, device=torch.device(arguments.device)),
        names=(ON, OFF, OPEN_CLIP),
        plain_loss=PlainSoftmaxLoss(),
        on_flags=[*(["--torchcompile"] if compiles else []), *policy],
    )


def build_arm(name: str, arguments: argparse.Namespace, *, precision: str, compiles: bool) -> Training:
    """One training, from the weights that the seed gives."""
    model, device = arguments.model, torch.device(arguments.device)
    if name == OPEN_CLIP:
        return _open_clip(model, device, precision=precision)
    if name == ON:
        engine = EngineConfig(
            device=str(device),
            precision=precision,
            torchcompile=compiles,
            grad_checkpointing=arguments.grad_checkpointing,
            grad_checkpointing_policy="selective",
        )
        return _ours(model, device, engine, optim=_optim(), loss=build_loss(LossConfig()))
    engine = EngineConfig(device=str(device), precision=precision, text_packing="off")
    optim = _optim({"foreach": False, "fused": False})
    return _ours(model, device, engine, optim=optim, loss=PlainSoftmaxLoss(), whole_last_block=True)


def _optim(opt_kwargs: Mapping[str, Any] | None = None) -> OptimConfig:
    settings = ArmSettings(model="", precision="", device=torch.device("cpu"))
    return OptimConfig(
        lr=settings.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        eps=settings.eps,
        wd=settings.weight_decay,
        opt_kwargs=opt_kwargs or {},
    )


def _ours(
    name: str,
    device: torch.device,
    engine: EngineConfig,
    *,
    optim: OptimConfig,
    loss: Loss,
    whole_last_block: bool = False,
) -> Training:
    built = create_model(name, device=str(device))
    built.model.train()
    for module in built.model.modules():
        if isinstance(module, Transformer):
            module.whole_last_block = whole_last_block
    precision = build_precision(engine.precision, device)
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=device)
    train_step = TrainStep(
        model=parallelize(built.model, config=engine, runtime=runtime),
        loss=loss,
        optimizer=build_optimizer(built.model, optim),
        precision=precision,
    )
    pack = build_packer(built.config, text_packing=engine.text_packing)

    def step(batch: HostBatch, lr: float) -> Tensor:
        texts = pack(batch.texts).to(device)
        return train_step([DeviceBatch(_images(batch, built, device), texts)], lr=lr).loss

    return Training(step, built.model)


def _open_clip(name: str, device: torch.device, *, precision: str) -> Training:
    built = create_model(name, device=str(device))  # the same draws of the same seed, loaded to be sure
    arm = OpenClipArm(ArmSettings(model=name, precision=precision, device=device))
    arm.model.load_state_dict(built.model.state_dict(), strict=True)

    def step(batch: HostBatch, lr: float) -> Tensor:
        for group in arm.optimizer.param_groups:
            group["lr"] = lr
        return arm.step(DeviceBatch(_images(batch, built, device), batch.texts.to(device)))

    return Training(step, arm.model)


def _images(batch: HostBatch, built: BuiltModel, device: torch.device) -> Tensor:
    return normalize(batch.images.to(device), mean=built.preprocess.mean, std=built.preprocess.std)


class PlainSoftmaxLoss(Loss):
    """The loss as CLIP's paper writes it (figure 3), for one process: all logits stored, two cross-entropies."""

    def begin(self, text_features: Tensor) -> GatheredRows:
        self._texts = at_least_float32(text_features)  # with their graph: autograd does the rest
        return super().begin(text_features)

    def _compare(self, images: Tensor, texts: GatheredRows, scale: Tensor, bias: Tensor | None) -> Tensor:
        logits = scale * images @ self._texts.T  # [B, E] x [E, B] -> [B, B]
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# What the curves say.


class Comparison(NamedTuple):
    """How far curves are apart: largest and mean |difference| over the steps."""

    largest: float
    """Of on against off."""
    mean: float
    band_largest: float
    """Of any two curves that differ by rounding: ``off`` in several orders of rows, and in fp32."""
    band_mean: float
    rows_largest: float
    """Of orders of rows alone."""
    rows_mean: float
    open_clip_largest: float
    """Of OpenCLIP against off."""
    open_clip_mean: float

    @property
    def within_noise(self) -> bool:
        """The rule that decides."""
        return self.largest <= TOLERANCE * self.band_largest and self.mean <= TOLERANCE * self.band_mean


def compare(losses: Mapping[str, Sequence[float]], exact: Mapping[str, Sequence[float]] | None = None) -> Comparison:
    """All curves of one precision against each other.

    Args:
        exact: those of fp32, for another precision: it may move a curve as far as its own rounding moves ``off``.
            Orders of rows do not show that, since a row's features are rounded alike in any of them.
    """
    twins = [curve for name, curve in losses.items() if name == OFF or name.startswith(NOISE)]
    orders = [differences(one, other) for one, other in combinations(twins, 2)]
    band = [*orders, *([differences(losses[OFF], exact[OFF])] if exact is not None else [])]
    ours, theirs = (differences(losses[name], losses[OFF]) for name in (ON, OPEN_CLIP))
    return Comparison(
        largest=max(ours),
        mean=statistics.fmean(ours),
        band_largest=max(map(max, band)),
        band_mean=max(map(statistics.fmean, band)),
        rows_largest=max(map(max, orders)),
        rows_mean=max(map(statistics.fmean, orders)),
        open_clip_largest=max(theirs),
        open_clip_mean=statistics.fmean(theirs),
    )


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """|one - other| at every step."""
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def statement(precision: str, comparison: Comparison) -> str:
    """The result in words."""
    verdict = "identical within noise" if comparison.within_noise else "NOT identical within noise"
    return (
        f"{precision}: on against off, largest difference {comparison.largest:.1e} against the band "
        f"{comparison.band_largest:.1e}, mean {comparison.mean:.1e} against {comparison.band_mean:.1e} "
        f"(OpenCLIP against off: {comparison.open_clip_largest:.1e} and {comparison.open_clip_mean:.1e}): {verdict}"
    )


def losses_of(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Precision -> arm -> losses."""
    return {name: part["losses"] for name, part in result["precisions"].items()}


def picture(result: Mapping[str, Any]) -> str:
    """Losses above, differences from 'off' below on a logarithmic scale; one column per precision."""
    columns = []
    for precision, losses in losses_of(result).items():
        curves = [Curve(name, COLORS[_kind(name)], losses[name]) for name in reversed(losses)]
        apart = [
            Curve(curve.label, curve.color, differences(curve.values, losses[OFF]))
            for curve in curves
            if curve.label != OFF
        ]
        columns.append(
            [
                Panel(f"loss, {precision}", curves),
                Panel(f"|difference from '{OFF}'|, {precision}", apart, log=True),
            ]
        )
    legend = {_kind(name): COLORS[_kind(name)] for name in next(iter(losses_of(result).values()))}
    return draw(columns, legend=legend, axis="step")


def report_of_results(directory: Path) -> str:
    """Statements and pictures of all measurements that were kept."""
    results = [json.loads(path.read_text()) for path in sorted(directory.glob("loss_curves_*.json"))]
    return "\n".join(map(_report, results)) if results else "No measurement is kept yet.\n"


def _report(result: Mapping[str, Any]) -> str:
    settings, run = result["settings"], result["run"]
    hardware = run["hardware"]
    device = "cuda" if "gpu" in hardware else "cpu"
    lines = [
        f"{settings['model']}, {settings['steps']} steps of {settings['batch_size']} pictures, learning rate "
        f"{settings['lr']:g} after {settings['warmup']} steps, blocks {'' if settings['compiled'] else 'not '}"
        f"compiled; {hardware.get('gpu', hardware['cpu'])}, {hardware['threads']} threads, torch "
        f"{run['versions']['torch']}, commit {(run['commit'] or '?')[:9]}{'+' if run['uncommitted_changes'] else ''}.",
        *(f"- {part['statement']}." for part in result["precisions"].values()),
        f"![losses and their differences, {device}](../images/{PICTURE.name.format(device=device)})",
    ]
    return "\n\n".join([lines[0], "\n".join(lines[1:-1]), lines[-1]]) + "\n"


def _kind(name: str) -> str:
    return NOISE if name.startswith(NOISE) else name


if __name__ == "__main__":
    sys.exit(main())
