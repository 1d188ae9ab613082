"""Losses of training with the linear layers of blocks in fp8, against bf16 and fp32, and how much of a model that is.

    python -m benchmarks.fp8_convergence              200 steps of the demo model; on a CPU torchao emulates fp8
    python -m benchmarks.fp8_convergence --shares     FLOPs of the layers concerned; counted without memory or a GPU

    same weights, same batches -> fp32 | bf16 | bf16, rows permuted | fp8 tensorwise | fp8 rowwise -> JSON, SVG

bf16 with the rows of every batch in another order is the same mathematics in other sums: as far as these two curves
are apart, rounding alone takes curves apart. What fp8 does beyond that is its own. Emulated products are rounded to fp8
like real ones and summed in fp32; a GPU sums them in a little less. Demo scenes and a small model show whether training
goes on, not what an accuracy becomes: for that, train the model in question both ways.
Legend: B batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.batches import HostBatch
from benchmarks.curve_picture import Curve, Panel, draw
from benchmarks.loss_curves import differences, draw_data, make_order
from benchmarks.provenance import ROOT, describe_run
from models.factory import create_model
from models.text_form import build_packer
from training.config import LossConfig, OptimConfig
from training.data.batch import DeviceBatch, normalize
from training.fp8 import convert_blocks, fitting_layers
from training.losses.build import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.train_step import TrainStep

RESULT = ROOT / "benchmarks" / "results" / "fp8_convergence_{device}.json"
PICTURE = ROOT / "docs" / "images" / "fp8_convergence.svg"
REFERENCE, PERMUTED = "bf16", "bf16, rows permuted"
ARMS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "off"),
    REFERENCE: ("amp_bf16", "off"),
    PERMUTED: ("amp_bf16", "off"),
    "fp8 tensorwise": ("amp_bf16", "tensorwise"),
    "fp8 rowwise": ("amp_bf16", "rowwise"),
}
"""Name -> --precision, --fp8."""
COLORS = dict(zip(ARMS, ("#2e8b57", "#1f5fa8", "#999999", "#c0392b", "#b8860b"), strict=True))
COUNTED = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "convnext_base_w", "convnext_xxlarge", "ViT-B-16-SigLIP")
logger = logging.getLogger("benchmarks.fp8_convergence")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all arms and writes numbers and picture, or counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", action="store_true", help="print the share of FLOPs in fp8, train nothing")
    parser.add_argument("--model", default="demo-vit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=3200, help="different pictures; seen again in another order")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=40, help="steps over which the learning rate rises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--emulate", action="store_true", help="also on a GPU that has fp8; a CPU always emulates")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/fp8_convergence_DEVICE.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    if arguments.shares:
        sys.stdout.write(share_table(COUNTED))
        return
    result = measure(arguments)
    out = arguments.out or Path(str(RESULT).format(device=torch.device(arguments.device).type))
    for path in (out, arguments.picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.picture.write_text(picture(result["losses"]))
    sys.stdout.write(json.dumps(result["summary"], indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the result file."""
    run = describe_run(torch.device(arguments.device))  # before: the load is that of others
    built = create_model(arguments.model, device="meta", reads_weights=False)
    data = draw_data(built, samples=arguments.samples, seed=arguments.seed)
    losses = {name: [round(loss, 7) for loss in train(name, data, arguments)] for name in ARMS}
    names = ("model", "steps", "batch_size", "samples", "lr", "warmup", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    emulated = is_emulated(arguments)
    return {
        "benchmark": "fp8_convergence",
        "settings": {**settings, "arms": ARMS, "emulated": emulated},
        "run": run,
        "summary": summarize(losses),
        "losses": losses,
    }


def is_emulated(arguments: argparse.Namespace) -> bool:
    """Whether products are rounded to fp8 and computed otherwise."""
    return bool(arguments.emulate) or torch.device(arguments.device).type == "cpu"


def train(name: str, data: HostBatch, arguments: argparse.Namespace) -> list[float]:
    """The losses of one arm, step by step."""
    start = time.monotonic()
    precision_name, recipe = ARMS[name]
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    built = create_model(arguments.model, device=str(device))
    model = built.model.train()
    if recipe != "off":
        convert_blocks([*model.image_blocks, *model.text_blocks], recipe, emulated=is_emulated(arguments))
    optim = OptimConfig(lr=arguments.lr, beta1=0.9, beta2=0.98, eps=1e-6)
    step = TrainStep(
        model=model,
        loss=build_loss(LossConfig()),
        optimizer=build_optimizer(model, optim),
        precision=build_precision(precision_name, device),
    )
    pack = build_packer(built.config, text_packing="auto")
    shuffle = torch.Generator().manual_seed(1) if name == PERMUTED else None
    order = make_order(len(data.images), steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed)
    losses = []
    for number, rows in enumerate(order):
        if shuffle is not None:
            rows = rows[torch.randperm(len(rows), generator=shuffle)]
        images = normalize(data.images[rows].to(device), mean=built.preprocess.mean, std=built.preprocess.std)
        lr = arguments.lr * min(1.0, (number + 1) / max(1, arguments.warmup))
        losses.append(step([DeviceBatch(images, pack(data.texts[rows]).to(device))], lr=lr).loss)
    curve: list[float] = torch.stack(losses).double().tolist()  # host sync
    logger.info("%s: %.4f -> %.4f in %.0f s", name, curve[0], curve[-1], time.monotonic() - start)
    return curve


def summarize(losses: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Of each arm: mean loss of the last quarter, and mean and largest |difference| from bf16 over all steps."""
    last = len(losses[REFERENCE]) * 3 // 4
    return {
        name: {
            "last_quarter": round(statistics.fmean(curve[last:]), 5),
            "mean_difference": round(statistics.fmean(differences(curve, losses[REFERENCE])), 5),
            "largest_difference": round(max(differences(curve, losses[REFERENCE])), 5),
        }
        for name, curve in losses.items()
    }


def picture(losses: Mapping[str, Sequence[float]]) -> str:
    """Losses, and below them their differences from bf16 on a logarithmic scale."""
    curves = [Curve(name, COLORS[name], losses[name]) for name in ARMS]
    apart = [
        Curve(curve.label, curve.color, differences(curve.values, losses[REFERENCE]))
        for curve in curves
        if curve.label != REFERENCE
    ]
    panels = [Panel("loss", curves), Panel(f"|difference from {REFERENCE}|", apart, log=True)]
    return draw([panels], legend=COLORS, axis="step")


def share_table(names: Sequence[str]) -> str:
    """Markdown: which part of the forward FLOPs of both towers are products in fp8."""
    lines = ["| model | in fp8, % of forward FLOPs |", "| --- | --- |"]
    lines += [f"| {name} | {100 * fp8_share(name):.0f} |" for name in names]
    return "\n".join([*lines, ""])


def fp8_share(name: str) -> float:
    """FLOPs of the layers that --fp8 converts, by all of a forward pass; texts padded, so that nothing is assumed."""
    built = create_model(name, device="meta", reads_weights=False)
    model, of_layers = built.model.requires_grad_(False), 0

    def count(linear: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal of_layers
        assert isinstance(linear, nn.Linear)
        of_layers += 2 * output.numel() * linear.in_features

    for block in [*model.image_blocks, *model.text_blocks]:
        for layer in fitting_layers(block).values():
            layer.register_forward_hook(count)
    images = torch.empty(1, 3, *built.config.vision_cfg.image_hw, device="meta")
    texts = torch.zeros(1, built.config.text_cfg.context_length, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images, texts)
    return of_layers / int(counter.get_total_flops())


if __name__ == "__main__":
    main()
