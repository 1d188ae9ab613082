"""``clipyard make-demo-data DIR``: write the demo shards and evaluation sets."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data.demo import make_demo_data
from training.data.demo_samples import DemoSpec
from training.data.demo_sheet import contact_sheet

MIN_SAMPLES_TO_SHARE = 2048
"""From here on several drawing processes pay for their start."""


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are `DemoSpec`'s."""
    spec = DemoSpec()
    parser = argparse.ArgumentParser(prog="clipyard make-demo-data", description=(__doc__ or "").strip())
    parser.add_argument("directory", type=Path, metavar="DIR", help="a new or empty directory")
    parser.add_argument("--samples", type=int, default=spec.samples, help="training samples (%(default)s)")
    parser.add_argument("--shards", type=int, default=spec.shards, help="training shards (%(default)s)")
    parser.add_argument("--seed", type=int, default=spec.seed, help="equal seeds give equal bytes (%(default)s)")
    parser.add_argument("--image-size", type=int, default=spec.image_size, metavar="PX", help="(%(default)s)")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also write a PNG of the first samples")
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the set; 0 also if it is there already, 1 if it cannot be written."""
    args = build_parser().parse_args(argv)
    processes = min(4, os.cpu_count() or 1) if args.samples >= MIN_SAMPLES_TO_SHARE else 1
    try:
        spec = DemoSpec(samples=args.samples, shards=args.shards, seed=args.seed, image_size=args.image_size)
        written = make_demo_data(args.directory, spec, processes=processes)
    except ValueError as error:
        sys.stderr.write(f"clipyard make-demo-data: {error}\n")
        return 1
    if args.contact_sheet:
        contact_sheet(spec).save(args.contact_sheet, "PNG", optimize=True)
    state = "wrote" if written else "already there:"
    sys.stdout.write(
        f"{state} {args.directory}: {spec.samples} training samples in {spec.shards} shards, {spec.val_samples} for "
        f"validation, {spec.zeroshot_samples} for zero-shot, {spec.retrieval_samples} for retrieval\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
