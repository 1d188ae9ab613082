"""The gates of speed that need no GPU: what a step computes, keeps and sends, counted beside OpenCLIP's.

    python -m benchmarks.counts                  all of them, about five minutes on one core; fails if a gate does
    python -m benchmarks.counts --only loss      some of them: prints, writes nothing
    python -m benchmarks.counts --compiled       with what is saved by compiled blocks: ten minutes more

Writes benchmarks/results/counts.json and docs/benchmarks/counts.md. No time is measured, so any machine will do.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.batches import LENGTHS_FILE
from benchmarks.provenance import ROOT, describe_run
from benchmarks.saved_activations import WAYS, saved_by_open_clip, saved_by_us
from benchmarks.scale_report import table
from benchmarks.step_counts import (
    OUR_LOSS,
    THEIR_LOSS,
    TINY,
    difference_from_open_clip,
    gathered_units,
    open_clip_flops,
    products_per_block,
    programs_of_batches,
    stored_logits,
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
SAVED_MODELS = ("ViT-B-32-256", "ViT-L-14", "ViT-H-14", "convnext_xxlarge")
SAVED_WAY = "selective"
"""The way of saved_activations.WAYS that has to keep no more than this share."""
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


def at_most(metric: str, ours: float, bound: float, *, open_clip: float | None = None) -> Count:
    """A gate on our number."""
    return Count(metric, ours, open_clip, f"at most {bound:g}", ours <= bound)


def times_fewer(metric: str, ours: float, open_clip: float, bound: float) -> Count:
    """A gate on the ratio."""
    return Count(metric, ours, open_clip, f"{bound:g} times fewer", open_clip / ours >= bound)


def share_of(metric: str, ours: float, open_clip: float, bound: float) -> Count:
    """A gate on the ratio, the other way round."""
    return Count(metric, ours, open_clip, f"at most {bound:.0%}", ours / open_clip <= bound)


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


def saved_activations(
    model_names: Sequence[str] = SAVED_MODELS, *, ways: Sequence[str] = ("plain", "selective")
) -> list[Count]:
    """MB per pair; compiled ways take minutes each."""
    counts = []
    for name in model_names:
        theirs = saved_by_open_clip(name) / 1e6
        for way in ways:
            ours = saved_by_us(name, caption_file(), way=way) / 1e6
            metric = f"MB saved for the backward pass per pair, {name}, {way}"
            counts.append(
                share_of(metric, ours, theirs, SAVED_SHARE) if way == SAVED_WAY else Count(metric, ours, theirs)
            )
    return counts


def loss() -> list[Count]:
    """Of the softmax loss on one of 64 ranks."""
    units, logits = "global batches of one tower's features exchanged by the loss", "B x G tensors made by the loss"
    return [
        at_most(units, gathered_units(OUR_LOSS), 2, open_clip=gathered_units(THEIR_LOSS)),
        at_most(logits, stored_logits(OUR_LOSS), 0, open_clip=stored_logits(THEIR_LOSS)),
    ]


def programs() -> list[Count]:
    """Of blocks compiled one by one."""
    found = programs_of_batches()
    return [
        at_most("graph breaks, 50 random batches", found.graph_breaks, 0),
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
    return ("pass" if count.passed else "FAIL") + (
        "" if not count.open_clip else f", {count.ours / count.open_clip:.1%}"
    )


def document(result: Mapping[str, Any]) -> str:
    """The page, from what the file says."""
    counts = [Count(**row) for row in result["counts"]]
    versions = result["run"]["versions"]
    return _PAGE.format(
        table=render(counts),
        commit=result["run"]["commit"][:12],
        torch=versions["torch"],
        open_clip=versions["open_clip_torch"],
        timm=versions["timm"],
        failed=sum(not count.passed for count in counts),
        gates=sum(bool(count.gate) for count in counts),
    )


_PAGE = """# What a step computes, keeps and sends: counts

Written by `python -m benchmarks.counts`; nobody edits it by hand. Counted, not timed: shapes on tensors without
memory, operations as they are called, so the numbers are those of any machine. {gates} gates, {failed} fail. Commit
{commit}, torch {torch}, open_clip {open_clip}, timm {timm}. `tests/test_counts.py` holds the gates in CI.

{table}
The last column: pass or fail, and ours as a share of OpenCLIP's.

- **Captions**: 10,000 recorded web alt-texts (`benchmarks/caption_lengths.json`, mean 15.5 of 77 tokens), shuffled
  with seed 0, the first 4 batches. With longer captions packing saves less.
- **GFLOPs**: forward and backward pass of both towers as the code runs on a CPU: fillers, and captions attending in
  groups of about one length (a GPU's kernels attend to each caption alone, which is less). OpenCLIP's own modules,
  captions of 77 tokens. torch's counter forgets the groups of depthwise convolutions in the backward pass; that is
  corrected for both.
- **MB saved**: bf16 autocast as on CUDA; ours on packed captions. *plain*: no flag. *compiled*: `--torchcompile`, by
  the partitioner that Inductor uses. *selective*: `--grad-checkpointing --grad-checkpointing-policy selective`.
  *both*: the two together. OpenCLIP is eager, its default. The gate is on the way that the table names; the rows
  without a gate do not meet it, or need not.
- **Loss**: the softmax loss on one of 64 ranks, against OpenCLIP's with `--local-loss --gather-with-grad`. Beside the
  features, ours sends two numbers per text.
- **Difference**: fp64 on the CPU, packed texts against OpenCLIP's padded ones, relative to the largest number of each
  tensor.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="print these, write nothing")
    parser.add_argument("--compiled", action="store_true", help="also count what compiled blocks save")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    run = describe_run(torch.device("cpu"))
    counts = []
    for name in arguments.only or SECTIONS:
        sys.stderr.write(f"{name}\n")
        with_compiled = arguments.compiled and name == "saved_activations"
        counts += saved_activations(ways=tuple(WAYS)) if with_compiled else SECTIONS[name]()
    sys.stdout.write(render(counts))
    if not arguments.only:
        result = {"benchmark": "counts", "run": run, "counts": [count._asdict() for count in counts]}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        arguments.document.write_text(document(result))
    return int(not all(count.passed for count in counts))


if __name__ == "__main__":
    sys.exit(main())
