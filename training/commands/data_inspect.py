"""``clipyard data inspect URL``: what is in the shards that --train-data names, and what is wrong with them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from models.config import load_model_config
from models.tokenizer import build_tokenizer
from training.config import DataConfig
from training.data.captions import CaptionReader
from training.data.contact_sheet import paint_sheet
from training.data.inspection import Broken, CountTokens, Findings, Inspector, spread
from training.data.manifest import read_manifest
from training.data.shards import ShardList, count_samples, expand_shards
from training.data.storage_errors import StorageError

COLUMNS, ROWS = 7, 4
_LISTED = 20
_PERCENTILES = (0, 5, 50, 95, 100)


def build_parser() -> argparse.ArgumentParser:
    """The command line; what training takes has its names and defaults."""
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="clipyard data inspect", description=(__doc__ or "").strip())
    parser.add_argument("url", metavar="URL", help="as for --train-data, or a manifest (.yaml, .json)")
    parser.add_argument("--samples", type=int, default=1000, help="how many to read, of 16 shards (%(default)s)")
    parser.add_argument("--all", action="store_true", help="read every sample of every shard")
    parser.add_argument("--out", type=Path, metavar="PNG", help="write a contact sheet of random samples")
    parser.add_argument("--list", action="store_true", help=f"list all broken samples, not the first {_LISTED}")
    parser.add_argument("--model", default="ViT-B-32", help="whose tokenizer counts tokens (%(default)s)")
    parser.add_argument("--image-key", default=defaults.image_key, help="(%(default)s)")
    parser.add_argument("--text-key", default=defaults.text_key, help="(%(default)s)")
    parser.add_argument("--json-text-key", default=defaults.json_text_key, help="caption fields of the .json member")
    parser.add_argument("--max-image-pixels", type=int, default=defaults.max_image_pixels, help="(%(default)s)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the report; 1 if the shards cannot be found or anything in them is broken."""
    args = build_parser().parse_args(argv)
    try:
        shards = _shards(args.url)
        inspector = Inspector(
            read_caption=CaptionReader(
                text_key=args.text_key, json_text_key=args.json_text_key, json_text_key_probs=None
            ),
            image_extensions=args.image_key.lower().split(";"),
            max_image_pixels=args.max_image_pixels,
            count_tokens=_token_counter(args.model),
            num_cells=COLUMNS * ROWS,
        )
        counted = count_samples(shards)
    except (ValueError, StorageError) as error:
        sys.stderr.write(f"clipyard data inspect: {error}\n")
        return 1
    for url, limit in ((url, None) for url in shards.urls) if args.all else spread(shards.urls, args.samples):
        inspector.read_shard(url, limit)
    findings = inspector.findings
    sys.stdout.write("\n".join(report(shards, counted, findings, listed=None if args.list else _LISTED)) + "\n")
    if args.out and findings.cells:
        cells = [(cell.image, cell.caption) for cell in findings.cells]
        paint_sheet(cells, columns=COLUMNS).save(args.out, "PNG", optimize=True)
        sys.stdout.write(f"contact sheet: {args.out}\n")
    return 1 if findings.broken else 0


def _shards(url: str) -> ShardList:
    if url.endswith((".yaml", ".yml", ".json")):
        return read_manifest(url).shards
    return expand_shards(url, flag="URL")


def _token_counter(model: str) -> CountTokens:
    """Counts tokens as the model reads them, begin and end included, cut at its context length."""
    tokenizer = build_tokenizer(load_model_config(model))
    padding = tokenizer([""])[0, -1]

    def count(text: str) -> int:
        return int((tokenizer([text])[0] != padding).sum())

    return count


def report(shards: ShardList, counted: int | None, findings: Findings, *, listed: int | None) -> Iterator[str]:
    """The lines of the report."""
    size = f"{counted:,} samples by sizes.json" if counted is not None else "no complete sizes.json"
    sources = f" of {len(shards.sources)} sources" if len(shards.sources) > 1 else ""
    yield f"{len(shards.urls):,} shards{sources}, {size}"
    yield (
        f"read {findings.samples:,} samples ({findings.bytes / 1e6:,.1f} MB) of {findings.shards:,} shards, "
        f"{findings.shards_to_the_end:,} of them to the end"
    )
    if findings.samples:
        yield f"members: {_counts(findings.extensions)}"
    if findings.widths:
        short = np.minimum(findings.widths, findings.heights)
        yield f"images: {_counts(findings.formats)}"
        yield "                   least      5 %   median     95 %     most"
        yield _row("width, px", findings.widths)
        yield _row("height, px", findings.heights)
        yield _row("short side, px", short)
        yield _row("file, kB", np.asarray(findings.image_bytes) / 1e3)
    if findings.caption_chars:
        yield _row("caption, chars", findings.caption_chars)
        yield _row("caption, tokens", findings.caption_tokens)
    yield from _broken_lines(findings, listed=listed)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common(12))


def _row(title: str, values: Sequence[int] | np.typing.NDArray[np.float64]) -> str:
    cells = (f"{value:>9,.4g}" if value < 1000 else f"{value:>9,.0f}" for value in np.percentile(values, _PERCENTILES))
    return f"  {title:<15}" + "".join(cells)


def _broken_lines(findings: Findings, *, listed: int | None) -> Iterator[str]:
    if not findings.broken:
        yield "broken: none"
        return
    reasons = Counter(item.reason if item.key is not None else "damaged shards" for item in findings.broken)
    yield f"broken: {_counts(reasons)}"
    # Shards first: what they lose is more than a sample.
    items = sorted(findings.broken, key=lambda item: item.key is not None)
    for item in items[:listed]:
        yield "  " + _describe(item)
    if listed is not None and len(items) > listed:
        yield f"  ... and {len(items) - listed:,} more: pass --list"


def _describe(item: Broken) -> str:
    if item.key is None:
        return f"{item.url}: {item.reason}"
    return f"{item.url}, sample {item.key!r} at byte {item.offset}: {item.reason}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
