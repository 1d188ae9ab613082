"""Puts the results of the train-step benchmark into docs/benchmarks/train_step.md: targets beside what was measured.

    python -m benchmarks.train_step_report

In the page a table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. Nobody writes there by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.open_clip_checkout import open_clip_label
from benchmarks.provenance import ROOT
from benchmarks.scale_report import fill, table

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks" / "train_step.md"
UNMEASURED = "not measured"
Result = dict[str, Any]


class Target(NamedTuple):
    """Samples/s relative to OpenCLIP's on one H200, and utilisation."""

    model: str
    batch_size: int
    defaults: float | None
    """None where OpenCLIP does not fit without checkpointing."""
    tuned: float
    stretch: float
    mfu_pct: float
    checkpointed: float | None = None
    """Against OpenCLIP where it has to checkpoint."""


TARGETS = (
    Target("ViT-B-32", 896, 2.1, 1.7, 1.95, 56),
    Target("ViT-B-32-256", 896, 1.9, 1.55, 1.75, 56),
    Target("ViT-B-16", 448, 1.5, 1.28, 1.4, 57),
    Target("ViT-L-14", 256, 1.33, 1.15, 1.25, 62, checkpointed=1.65),
    Target("ViT-H-14", 128, 1.35, 1.2, 1.3, 62, checkpointed=1.7),
    Target("convnext_base_w", 256, 1.5, 1.25, 1.65, 30),
    Target("convnext_xxlarge", 80, 1.4, 1.25, 1.4, 50, checkpointed=1.75),
    Target("convnext_xxlarge", 256, None, 1.2, 1.35, 52, checkpointed=1.75),
)
LOADED = Target("ViT-B-32-256", 896, 2.5, 2.0, 2.0, 56)
"""With loaders in the loop: ``benchmarks.end_to_end``."""
TARGET_GPU = "H200"
TARGET_PRECISION = "amp_bf16"
FULL_LENGTH = {"open_clip": 1.1, "open_clip_tuned": 1.05}
"""Targets where all captions have 77 tokens: nothing is saved by packing."""


class Measured(NamedTuple):
    """One rival in one result file."""

    file: str
    result: Result
    rival: str
    comparison: Result


def load_results(folder: Path) -> list[Measured]:
    """Everything that was measured, by file."""
    return [
        Measured(path.name, result, rival, comparison)
        for path in sorted(folder.glob("train_step_*.json"))
        if "comparisons" in (result := json.loads(path.read_text()))
        for rival, comparison in result["comparisons"].items()
    ]


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """By name."""
    measured = load_results(folder)
    return {
        "gpu": _targets(measured, folder),
        "full_length": _full_length(measured),
        "arms": _arms(measured),
        "unmeasured": "".join(f"- {line}\n" for line in unmeasured(measured)) or "Nothing.\n",
    }


def write_page(page: Path, folder: Path = RESULTS) -> None:
    """The page with the tables of now."""
    page.write_text(fill(page.read_text(), tables(folder)))


def _targets(measured: Sequence[Measured], folder: Path) -> str:
    header = ("model", "batch", "vs defaults", "vs checkpointed", "vs tuned", "MFU, useful")
    rows = []
    for target in TARGETS:
        cells = [
            _against(measured, target, rival, goal)
            for rival, goal in (
                ("open_clip", f"{target.defaults or ''}"),
                ("open_clip_checkpointed", f"{target.checkpointed or ''}"),
                ("open_clip_tuned", f"{target.tuned} / {target.stretch}"),
            )
        ]
        used = [_percent(item.comparison["arms"]["clipyard"]["mfu_useful"]) for item in _timed(measured, target)]
        rows.append(
            [target.model, target.batch_size, *cells, f"{used[0] if used else UNMEASURED} ({target.mfu_pct} %)"]
        )
    return table(header, [*rows, _loaded(folder)])


def _loaded(folder: Path) -> list[object]:
    """The steps with their loaders, against the defaults and against OpenCLIP tuned."""
    found = {False: UNMEASURED, True: UNMEASURED}
    for path in sorted(folder.glob("end_to_end_*.json")):
        result = json.loads(path.read_text())
        settings = result["settings"]
        same = (settings["model"], settings["batch_size"], settings["precision"]) == (*LOADED[:2], TARGET_PRECISION)
        if same and TARGET_GPU in result["run"]["hardware"].get("gpu", ""):
            found[settings["tune_open_clip"]] = f"{_span(result['ratio'])}, {open_clip_label(result['run'])}"
    cells = [f"{found[False]} ({LOADED.defaults})", "", f"{found[True]} ({LOADED.tuned})"]
    return [f"{LOADED.model}, loaders in the loop", LOADED.batch_size, *cells, ""]


def _full_length(measured: Sequence[Measured]) -> str:
    rows = []
    for target in TARGETS:
        if target.defaults is None:
            continue  # a larger batch of a model that is there
        cells = [_against(measured, target, rival, f"{goal}", full_length=True) for rival, goal in FULL_LENGTH.items()]
        rows.append([target.model, target.batch_size, *cells])
    return table(("model", "batch", "vs defaults", "vs tuned"), rows)


def _arms(measured: Sequence[Measured]) -> str:
    header = (
        *(
            "model",
            "our flags",
            "captions",
            "hardware",
            "against",
            "ratio",
            "by processor time",
            "samples/s, ours / theirs",
        ),
        *("MFU, ours / theirs", "GiB, ours / theirs", "steps each", "file and commit"),
    )
    rows = [_arm_row(item) for item in measured]
    return table(header, rows) if rows else f"{UNMEASURED.capitalize()}.\n"


def _arm_row(item: Measured) -> list[str]:
    result, comparison, settings = item.result, item.comparison, item.result["settings"]
    hardware = result["run"]["hardware"]
    on = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    flags = " ".join(settings.get("flags", [])) or "none"
    against = f"{item.rival}, {open_clip_label(result['run'])}"
    captions = f"{result['caption_tokens']['mean']:.1f} tokens, {result['text_tokens']['saved_pct']:.0f} % saved"
    row = [f"{settings['model']}, {settings['precision']}, {settings['batch_size']}", flags, captions, on, against]
    ours, theirs = (comparison.get("arms", {}).get(name) for name in ("clipyard", item.rival))
    if ours is None or theirs is None:
        return [*row, _ratio(comparison), "", "", "", "", "", _origin(item)]
    memory = [_memory(result, name, arm) for name, arm in (("clipyard", ours), (item.rival, theirs))]
    return [
        *row,
        _ratio(comparison),
        _span(comparison["processor_time_ratio"]) if "processor_time_ratio" in comparison else "",
        f"{ours['samples_per_s']:.4g} / {theirs['samples_per_s']:.4g}",
        f"{_percent(ours['mfu_useful'])} / {_percent(theirs['mfu_useful'])}",
        " / ".join(memory),
        str(ours["steps"]),
        _origin(item),
    ]


def unmeasured(measured: Sequence[Measured]) -> list[str]:
    """Which targets no result speaks about."""
    lines = []
    for target in TARGETS:
        goals = {
            "open_clip": target.defaults is not None,
            "open_clip_tuned": True,
            "open_clip_checkpointed": target.checkpointed is not None,
        }
        missing = [rival for rival, wanted in goals.items() if wanted and _find(measured, target, rival) is None]
        missing += [
            f"{rival} with all captions full"
            for rival in FULL_LENGTH
            if target.defaults and _find(measured, target, rival, True) is None
        ]
        if missing:
            lines.append(f"{target.model}, batch {target.batch_size}: against {', '.join(missing)}")
    return lines


def _timed(measured: Sequence[Measured], target: Target) -> Iterator[Measured]:
    return (
        item
        for rival in ("open_clip", "open_clip_tuned", "open_clip_checkpointed")
        if (item := _find(measured, target, rival)) is not None and "ratio" in item.comparison
    )


def _find(measured: Sequence[Measured], target: Target, rival: str, full_length: bool = False) -> Measured | None:
    """On the GPU of the targets, in their precision, in one process, our blocks compiled; a ratio before a reason."""
    wanted = (*target[:2], full_length, TARGET_PRECISION, ["--torchcompile"])
    keys = ("model", "batch_size", "full_length", "precision", "flags")
    found = [
        item
        for item in measured
        if tuple(item.result["settings"].get(key) for key in keys) == wanted
        and item.rival == rival
        and TARGET_GPU in item.result["run"]["hardware"].get("gpu", "")
        and item.result["world_size"] == 1
        and "unfinished" not in item.comparison
    ]
    # Of several OpenCLIPs a checkout is the stronger rival where it is tuned; its defaults are those of the release.
    is_checkout = [bool((item.result["run"].get("open_clip") or {}).get("commit")) for item in found]
    ranked = sorted(
        zip(found, is_checkout, strict=True),
        key=lambda pair: ("ratio" not in pair[0].comparison, pair[1] != ("tuned" in rival)),
    )
    return ranked[0][0] if ranked else None


def _against(measured: Sequence[Measured], target: Target, rival: str, goal: str, *, full_length: bool = False) -> str:
    """What was measured, and the target in brackets."""
    item = _find(measured, target, rival, full_length)
    if item is None and not goal:
        return ""
    said = UNMEASURED if item is None else f"{_ratio(item.comparison)}, {open_clip_label(item.result['run'])}"
    return f"{said}{f' ({goal})' if goal else ''}"


def _ratio(comparison: Result) -> str:
    if "void" in comparison:
        return f"void: {comparison['void']}"
    if "out_of_memory" in comparison:
        return f"out of memory: {', '.join(comparison['out_of_memory'])}"
    if "unfinished" in comparison:
        return f"{UNMEASURED}: {comparison['unfinished']}"
    return _span(comparison["ratio"])


def _span(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _origin(item: Measured) -> str:
    return f"`{item.file}`, {(item.result['run']['commit'] or 'no commit')[:10]}"


def _memory(result: Result, name: str, arm: Result) -> str:
    peak = arm.get("peak_gib") or result.get("memory", {}).get(name, {}).get("peak_gib")
    return "?" if peak is None else f"{peak:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    write_page(PAGE)
