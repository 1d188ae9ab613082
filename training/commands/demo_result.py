"""``clipyard demo-result RUN``: what a demo run has learned, against where it started and against chance."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Metrics = Mapping[str, float]


class Row(NamedTuple):
    """One metric in words, at the first and the last evaluation, and what guessing gives."""

    title: str
    before: float | None
    after: float
    chance: float | None
    percent: bool


def read_results(run: Path) -> tuple[Metrics, Metrics]:
    """The first and the last evaluation of a run.

    Raises:
        ValueError: there is none.
    """
    path = run / "checkpoints" / "results.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"no evaluation in {path}: pass the folder of a run, --logs joined with --name")
    return json.loads(lines[0]), json.loads(lines[-1])


def read_params(run: Path) -> dict[str, str]:
    """The run's settings, as ``params.txt`` lists them: ``name: value``."""
    path = run / "params.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


def chance_levels(params: Mapping[str, str]) -> dict[str, float]:
    """What guessing gives on the sets of a run, by metric; empty for sets that are no longer there."""
    levels: dict[str, float] = {}
    for directory in _directories(params.get("zeroshot_data")):
        names = directory / "classnames.txt"
        if names.is_file():
            classes = len(names.read_text().splitlines())
            levels[f"{directory.name}-zeroshot-top1"] = 1 / classes
            levels[f"{directory.name}-zeroshot-top5"] = min(1.0, 5 / classes)
    for directory in _directories(params.get("retrieval_data")):
        images = sum(_count_images(tar) for tar in directory.glob("test/*.tar"))
        if images:
            # With the same number of captions for every image, both directions have the same odds.
            levels[f"{directory.name}-image_retrieval_recall@5"] = min(1.0, 5 / images)
            levels[f"{directory.name}-text_retrieval_recall@5"] = min(1.0, 5 / images)
    return levels


def _directories(value: str | None) -> Iterator[Path]:
    yield from (Path(part) for part in (value or "").split("::") if part not in ("", "None"))


def _count_images(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(name.endswith((".jpg", ".jpeg", ".png", ".webp")) for name in tar.getnames())


TITLES = (
    ("-zeroshot-top1", "zero-shot top-1"),
    ("-zeroshot-top5", "zero-shot top-5"),
    ("-image_retrieval_recall@5", "image found by text, R@5"),
    ("-text_retrieval_recall@5", "text found by image, R@5"),
    ("clip_val_loss", "validation loss"),
)


def result_rows(first: Metrics, last: Metrics, chance: Mapping[str, float]) -> list[Row]:
    """The metrics that a newcomer looks for, in the order of ``TITLES``."""
    return [
        Row(
            f"{title} ({name.removesuffix(ending)})" if name != ending else title,
            first.get(name) if first is not last else None,
            last[name],
            chance.get(name),
            percent=name != "clip_val_loss",
        )
        for ending, title in TITLES
        for name in last
        if name.endswith(ending)
    ]


def render(run: Path, rows: Sequence[Row]) -> str:
    """The table, then where to look and what to try."""
    width = max(len(row.title) for row in rows)
    lines = [f"{'':<{width}}  {'random':>8}  {'trained':>8}  {'chance':>8}"]
    lines += [
        f"{row.title:<{width}}  "
        + "  ".join(_number(value, percent=row.percent) for value in (row.before, row.after, row.chance))
        for row in rows
    ]
    lines += [
        "",
        f"log           {run / 'out.log'}",
        f"checkpoints   {run / 'checkpoints'}  (OpenCLIP loads them: see the README)",
        f"curves        tensorboard --logdir {run.parent}",
        "next          clipyard models ViT-B; clipyard train --help; docs/architecture.md",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, *, percent: bool) -> str:
    if value is None:
        return f"{'-':>8}"
    return f"{100 * value:6.1f} %" if percent else f"{value:8.3f}"


def main(argv: Sequence[str]) -> int:
    """Print the result of one run; 1 if it has none."""
    parser = argparse.ArgumentParser(prog="clipyard demo-result", description=(__doc__ or "").strip())
    parser.add_argument("run", type=Path, help="folder of the run: --logs joined with --name")
    run: Path = parser.parse_args(argv).run
    try:
        first, last = read_results(run)
    except ValueError as error:
        sys.stderr.write(f"clipyard demo-result: {error}\n")
        return 1
    sys.stdout.write(render(run, result_rows(first, last, chance_levels(read_params(run)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
