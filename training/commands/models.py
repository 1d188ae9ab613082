"""``clipyard models``: the names that --model takes; with a pattern, also how large and how costly each model is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from models.config import list_models, load_model_config

HEADER = ("model", "image px", "tokens", "image M", "text M", "total M", "image GMAC", "text GMAC")


def match_names(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a shell pattern matches, or, without wildcards, that contain it; capitals do not matter."""
    wanted = pattern.lower()
    if not any(sign in wanted for sign in "*?["):
        wanted = f"*{wanted}*"
    return [name for name in names if fnmatchcase(name.lower(), wanted)]


def profile_row(name: str) -> tuple[str, ...]:
    """One line of the table: sizes in pixels, tokens and millions, cost of one forward pass of one sample."""
    # Here and not above: a list of names needs no torch.
    from models.profile import profile_model

    config = load_model_config(name)
    profile = profile_model(config)
    height, width = config.vision_cfg.image_hw
    return (
        name,
        f"{height}" if height == width else f"{height}x{width}",
        str(config.text_cfg.context_length),
        f"{profile.image_parameters / 1e6:.1f}",
        f"{profile.text_parameters / 1e6:.1f}",
        f"{profile.parameters / 1e6:.1f}",
        f"{profile.image_macs / 1e9:.2f}",
        f"{profile.text_macs / 1e9:.2f}",
    )


def _write_row(cells: Sequence[str], name_width: int) -> None:
    numbers = (cell.rjust(max(8, len(title))) for cell, title in zip(cells[1:], HEADER[1:], strict=True))
    sys.stdout.write("  ".join((cells[0].ljust(name_width), *numbers)) + "\n")


def main(argv: Sequence[str]) -> int:
    """Print the names, or the table of those that match; 1 if none does."""
    parser = argparse.ArgumentParser(prog="clipyard models", description=(__doc__ or "").strip())
    parser.add_argument("pattern", nargs="?", help="part of a name, or a shell pattern such as 'ViT-B-*'")
    pattern: str | None = parser.parse_args(argv).pattern
    if pattern is None:
        sys.stdout.write("\n".join(list_models()) + "\n")
        return 0
    names = match_names(list_models(), pattern)
    if not names:
        sys.stderr.write(f"no model matches {pattern!r}: `clipyard models` lists all names\n")
        return 1
    width = max(map(len, names))
    _write_row(HEADER, width)
    for name in names:
        try:
            _write_row(profile_row(name), width)
        except ValueError as error:
            sys.stdout.write(f"{name:<{width}}  not available here: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
