"""The gates of speed that need no GPU: what a step computes, keeps and sends, counted beside OpenCLIP's.

    python -m benchmarks.counts                  all of them, minutes on one core; fails if a gate does
    python -m benchmarks.counts --check          the same for CI: prints, writes nothing
    python -m benchmarks.counts --only loss      some of them: prints, writes nothing

Writes benchmarks/results/counts.json and docs/benchmarks/counts.md. No time is measured, so any machine will do.
A gate that fails ends with code 1. A target that is not met is shown as unmet, and does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.batches import LENGTHS_FILE
from benchmarks.provenance import ROOT, describe_run
from benchmarks.saved_activations import BATCHES, flops_computed_again, saved_by_open_clip, saved_by_us
from benchmarks.scale_report import table
from benchmarks.step_counts import (
    OUR_LOSS,
    THEIR_LOSS,
    TINY,
    difference_from_open_clip,
    gathered_units,
    large_tensors_of_loss,
    memory_of_loss,
    open_clip_flops,
    products_per_block,
    programs_of_batches,
    tokens_per_real_token,
)
from benchmarks.training_flops import training_flops_per_sample

RESULT = ROOT / "benchmarks" / "results" / "counts.json"
DOCUMENT = ROOT / "docs" / "benchmarks" / "counts.md"
CONTEXT = 77
LOCAL_BATCHES = {
    "ViT-B-32": 896,
    "ViT-B-32-256": 896,
    "ViT-B-16": 448,
    "ViT-L-14": 256,
    "ViT-H-14": 128,
    "convnext_base_w": 256,
    "convnext_xxlarge": 80,
    "ViT-bigG-14": 64,
}
FLOP_GATES = {"ViT-B-32-256": 1.47, "ViT-L-14": 1.10, "ViT-H-14": 1.13, "convnext_xxlarge": 1.085, "ViT-bigG-14": 1.09}
"""Times fewer than OpenCLIP's, at least."""
SAVED_SHARE = 0.55
"""Of OpenCLIP's activations: a target for every way of saved_activations.WAYS, a gate for one of them."""
SAVED_WAY = "selective"
_VIT_WAYS = ("plain", "compiled", SAVED_WAY)
SAVED_MODELS: Mapping[str, Sequence[str]] = {
    "ViT-B-32-256": _VIT_WAYS,
    "ViT-L-14": _VIT_WAYS,
    "ViT-H-14": _VIT_WAYS,
    # Compiled, it is a program for each block, of which all have drop rates of their own: minutes.
    "convnext_xxlarge": ("plain", SAVED_WAY),
}
SAVED_METRIC = "MB saved for the backward pass per pair"
_BATCHES = 4
"""Of captions, from the start of the shuffled file."""


class Count(NamedTuple):
    """One row: a number, what it is compared with, and the gate it has to pass."""

    metric: str
    ours: float
    open_clip: float | None = None
    gate: str = ""
    """Empty for a number that is only shown."""
    passed: bool = True
    is_target: bool = False
    """Shown as unmet where it is missed; no failure."""

    @property
    def has_failed(self) -> bool:
        """A gate, and missed."""
        return not self.passed and not self.is_target


def exactly(metric: str, ours: float, value: float, *, open_clip: float | None = None) -> Count:
    """A gate that less would not pass either: it would mean that the count is wrong."""
    return Count(metric, ours, open_clip, f"exactly {value:g}", ours == value)


def at_most(metric: str, ours: float, bound: float, *, open_clip: float | None = None) -> Count:
    """A gate on our number."""
    return Count(metric, ours, open_clip, f"at most {bound:g}", ours <= bound)


def times_fewer(metric: str, ours: float, open_clip: float, bound: float) -> Count:
    """A gate on the ratio."""
    return Count(metric, ours, open_clip, f"{bound:g} times fewer", open_clip / ours >= bound)


def share_of(metric: str, ours: float, open_clip: float, bound: float, *, is_target: bool = False) -> Count:
    """A gate or a target for the ratio, the other way round."""
    gate = f"target: {bound:.0%}" if is_target else f"at most {bound:.0%}"
    return Count(metric, ours, open_clip, gate, ours / open_clip <= bound, is_target)


@cache
def caption_file() -> tuple[int, ...]:
    """Lengths of all 10,000 recorded captions, shuffled once and for all."""
    histogram: Mapping[str, int] = json.loads(LENGTHS_FILE.read_text())["histogram"]
    lengths = [int(length) for length, number in histogram.items() for _ in range(number)]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


def caption_batches(batch_size: int) -> list[list[int]]:
    """The first batches of the shuffled file."""
    lengths = caption_file()
    last = min(len(lengths), _BATCHES * batch_size) - batch_size
    return [list(lengths[start : start + batch_size]) for start in range(0, last + 1, batch_size)]


def typical_captions(count: int) -> list[int]:
    """A few captions with the file's own spread and mean: the mean length of each ``count``-th of the sorted file."""
    ordered = sorted(caption_file())
    bounds = [len(ordered) * place // count for place in range(count + 1)]
    return [round(fmean(ordered[start:end])) for start, end in pairwise(bounds)]


def flops(model_names: Sequence[str] = tuple(LOCAL_BATCHES), *, batches: int = _BATCHES) -> list[Count]:
    """GFLOPs of training on one pair: batches of the size that the model trains with."""
    counts = []
    for name in model_names:
        batch_size = LOCAL_BATCHES[name]
        lengths = caption_file()[: batches * batch_size]
        computed = training_flops_per_sample(name, lengths, batch_size=batch_size).computed / 1e9
        theirs = open_clip_flops(name) / 1e9
        metric = f"training GFLOPs per pair, {name}, batches of {batch_size}"
        bound = FLOP_GATES.get(name)
        counts.append(times_fewer(metric, computed, theirs, bound) if bound else Count(metric, computed, theirs))
        if name == "ViT-B-32-256":
            counts.append(at_most(metric, computed, 35.4, open_clip=theirs))
    return counts


def text_tokens() -> list[Count]:
    """Fillers and all, for every batch size of the table."""
    counts = []
    for batch_size in sorted(set(LOCAL_BATCHES.values())):
        batches = caption_batches(batch_size)
        padded = CONTEXT * batch_size * len(batches) / sum(map(sum, batches))
        ours = tokens_per_real_token(batches, CONTEXT)
        counts.append(at_most(f"text tokens computed per token, batches of {batch_size}", ours, 1.10, open_clip=padded))
    return counts


def products() -> list[Count]:
    """Of a block's forward pass."""
    found = products_per_block()
    theirs = float(found.open_clip)
    return [
        at_most("matrix products of a block, forward", found.block, 4, open_clip=theirs),
        at_most("matrix products of the last block, read at one token", found.last_block, 5, open_clip=theirs),
    ]


def saved_activations(models: Mapping[str, Sequence[str]] = SAVED_MODELS) -> list[Count]:
    """MB per pair by way, and what the way with the gate computes again for it."""
    # The same captions once and twice, so that the pairs of the larger batch are like those of the smaller one.
    small, large = BATCHES
    captions = typical_captions(small) * (large // small)
    counts = []
    for name, ways in models.items():
        theirs = saved_by_open_clip(name) / 1e6
        for way in ways:
            ours, metric = saved_by_us(name, captions, way=way) / 1e6, f"{SAVED_METRIC}, {name}, {way}"
            counts.append(share_of(metric, ours, theirs, SAVED_SHARE, is_target=way != SAVED_WAY))
        again = 100 * flops_computed_again(name, captions[:small])
        counts.append(at_most(f"% of training FLOPs computed again, {name}, {SAVED_WAY}", again, 1))
    return counts


def loss() -> list[Count]:
    """Of the softmax loss on one of many ranks."""
    units = "global batches of one tower's features exchanged by the loss"
    tensors = "tensors made by the loss, larger than an eighth of B x G"
    memory = "memory of the loss at 1,024 ranks, in matrices of B x G"
    return [
        exactly(units, gathered_units(OUR_LOSS), 2, open_clip=gathered_units(THEIR_LOSS)),
        exactly(tensors, large_tensors_of_loss(OUR_LOSS), 0, open_clip=large_tensors_of_loss(THEIR_LOSS)),
        at_most(memory, memory_of_loss(OUR_LOSS), 0.1, open_clip=memory_of_loss(THEIR_LOSS)),
    ]


def programs() -> list[Count]:
    """Of blocks compiled one by one."""
    found = programs_of_batches()
    return [
        exactly("programs of compiled blocks, 50 random batches", found.first, 4),
        exactly("graph breaks, 50 random batches", found.graph_breaks, 0),
        at_most("recompilations after the first of 50 random batches", found.recompiles, 3),
    ]


def equality(model_names: Sequence[str] = (TINY, "ViT-B-32")) -> list[Count]:
    """In fp64 on the CPU, texts packed."""
    counts = []
    for name in model_names:
        found = difference_from_open_clip(name)
        counts.append(at_most(f"relative difference from OpenCLIP, features, {name}", found.features, 1e-12))
        counts.append(at_most(f"relative difference from OpenCLIP, gradients, {name}", found.gradients, 1e-12))
    return counts


SECTIONS: Mapping[str, Callable[[], list[Count]]] = {
    "flops": flops,
    "text_tokens": text_tokens,
    "products": products,
    "saved_activations": saved_activations,
    "loss": loss,
    "programs": programs,
    "equality": equality,
}


def render(counts: Sequence[Count]) -> str:
    """Markdown."""
    return table(
        ["metric", "ours", "OpenCLIP", "gate", ""],
        [
            [count.metric, _number(count.ours), _number(count.open_clip), count.gate or "-", _verdict(count)]
            for count in counts
        ],
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:,.2f}".rstrip("0").rstrip(".")


def _verdict(count: Count) -> str:
    if not count.gate:
        return "" if count.open_clip is None else f"{count.ours / count.open_clip:.1%}"
    good, bad = ("met", "unmet") if count.is_target else ("pass", "FAIL")
    share = f", {count.ours / count.open_clip:.1%}" if count.open_clip else ""
    return (good if count.passed else bad) + share


def document(result: Mapping[str, Any]) -> str:
    """The page, from what the file says."""
    counts = [Count(**row) for row in result["counts"]]
    versions = result["run"]["versions"]
    gates = [count for count in counts if count.gate and not count.is_target]
    return _PAGE.format(
        table=render(counts),
        commit=result["run"]["commit"][:12],
        torch=versions["torch"],
        open_clip=versions["open_clip_torch"],
        timm=versions["timm"],
        gates=len(gates),
        failed=sum(count.has_failed for count in gates),
        unmet=sum(count.is_target and not count.passed for count in counts),
        share=f"{SAVED_SHARE:.0%}",
        **{way: _range_of_shares(counts, way) for way in _VIT_WAYS},
    )


def _range_of_shares(counts: Sequence[Count], way: str) -> str:
    """Of OpenCLIP's activations, over the models."""
    found = [
        count.ours / count.open_clip
        for count in counts
        if count.open_clip and count.metric.startswith(SAVED_METRIC) and count.metric.endswith(way)
    ]
    return f"{100 * min(found):.0f} to {100 * max(found):.0f} %"


_PAGE = """# What a step computes, keeps and sends: counts

Written by `python -m benchmarks.counts`; nobody edits it by hand. Counted, not timed: shapes on tensors without
memory, operations as they are called, so the numbers are those of any machine. {gates} gates, {failed} fail;
{unmet} targets are unmet. Commit {commit}, torch {torch}, open_clip {open_clip}, timm {timm}. CI runs all of it.

{table}
The last column: pass or fail of a gate, met or unmet for a target, and ours as a share of OpenCLIP's.

- **Captions**: 10,000 recorded web alt-texts (`benchmarks/caption_lengths.json`, mean 15.5 of 77 tokens), shuffled
  with seed 0, the first 4 batches. With longer captions packing saves less.
- **GFLOPs**: forward and backward pass of both towers as the code runs on a CPU: fillers, and captions attending in
  groups of about one length (a GPU's kernels attend to each caption alone, which is less). OpenCLIP's own modules,
  captions of 77 tokens. torch's counter forgets the groups of depthwise convolutions in the backward pass; that is
  corrected for both.
- **MB saved**: bf16 autocast as on CUDA; ours on packed captions of the file's mean length. **Without checkpointing the
  target of {share} is missed** where the table says unmet: *plain*, no flag, keeps {plain}; *compiled*
  (`--torchcompile`, by the partitioner that Inductor uses; not counted for convnext_xxlarge) {compiled}. The gate is on
  *selective* (`--grad-checkpointing --grad-checkpointing-policy selective`, uncompiled): it keeps {selective} and
  computes norms, activations, casts and depthwise convolutions again, and no other product. What that is in FLOPs
  stands in the table; in time it is not measured. OpenCLIP is eager without checkpointing, its default.
- **Loss**: the softmax loss on one of 64 ranks, against OpenCLIP's with `--local-loss --gather-with-grad`. Beside the
  features, ours sends two numbers per text.
- **Programs**: demo-vit's blocks on one process, with dynamo's own backend: guards and graphs, not Inductor's code.
- **Difference**: fp64 on the CPU, packed texts against OpenCLIP's padded ones, relative to the largest number of each
  tensor.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="print these, write nothing")
    parser.add_argument("--check", action="store_true", help="print all, write nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    run = describe_run(torch.device("cpu"))
    counts = []
    for name in arguments.only or SECTIONS:
        sys.stderr.write(f"{name}\n")
        counts += SECTIONS[name]()
    sys.stdout.write(render(counts))
    if not arguments.only and not arguments.check:
        result = {"benchmark": "counts", "run": run, "counts": [count._asdict() for count in counts]}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        arguments.document.write_text(document(result))
    return int(any(count.has_failed for count in counts))


if __name__ == "__main__":
    sys.exit(main())
