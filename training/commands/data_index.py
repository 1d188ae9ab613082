"""``clipyard data index URL``: read every shard to its end, report damage, write sizes.json and byte offsets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data.shard_index import INDEX_SUFFIX, index_places, index_shards, update_sizes, write_index
from training.data.shards import expand_shards

_DEFAULT_WORKERS = 8


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="clipyard data index", description=(__doc__ or "").strip())
    parser.add_argument("url", metavar="URL", help="shards, as for --train-data")
    parser.add_argument("--out", metavar="DIR", help="write there, not beside the shards; needed if they are remote")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(_DEFAULT_WORKERS, os.cpu_count() or 1),
        help="shards that are read at once (%(default)s)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the files; 1 if a shard is damaged (it is left out) or nothing can be written."""
    args = build_parser().parse_args(argv)
    try:
        urls = tuple(dict.fromkeys(expand_shards(args.url, flag="URL").urls))
        samples, damaged = _index(urls, args.out, workers=max(1, args.workers))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"clipyard data index: {error}\n")
        return 1
    sys.stdout.write(f"{len(urls) - damaged:,} shards indexed, {samples:,} samples; {damaged:,} shards damaged\n")
    return 1 if damaged else 0


def _index(urls: Sequence[str], out: str | None, *, workers: int) -> tuple[int, int]:
    """(samples indexed, shards damaged)."""
    places = index_places(urls, out)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    samples = damaged = 0
    counts: dict[Path, dict[str, int | None]] = {}
    for index, place in zip(index_shards(urls, workers=workers), places, strict=True):
        count: int | None = len(index.offsets)
        if index.damage is not None:
            sys.stderr.write(f"{index.url}: {index.damage} ({count} samples before it)\n")
            damaged, count = damaged + 1, None
            place.unlink(missing_ok=True)
        else:
            write_index(index, place)
            samples += len(index.offsets)
        counts.setdefault(place.parent, {})[place.name.removesuffix(INDEX_SUFFIX)] = count
    for directory, sizes in counts.items():
        update_sizes(directory, sizes)
    return samples, damaged


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
