"""What a run knows about its checkpoints beside their content: which are good, suspect, or best."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

TAGS_NAME = "TAGS.json"
MARGIN_STEPS = 100
"""How long before a spike is seen its cause may lie. Source: Chowdhery et al. 2022 (PaLM), section 5.1."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best value of a metric so far."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class Tags:
    """The content of TAGS.json."""

    good: frozenset[int] = frozenset()
    """Steps that went on well for a while after they were saved."""
    suspect: frozenset[int] = frozenset()
    """Steps from the onset of a spike or of a divergence on."""
    best: Best | None = None

    def with_good(self, step: int) -> Tags:
        """A suspect checkpoint does not become good."""
        return self if step in self.suspect else replace(self, good=self.good | {step})

    def with_suspect(self, steps: Collection[int]) -> Tags:
        """These, and no longer good."""
        return replace(self, good=self.good.difference(steps), suspect=self.suspect.union(steps))

    def with_metric(self, *, metric: str, step: int, value: float) -> Tags:
        """Best if better than what is there; of another metric, or not finite, never."""
        if not math.isfinite(value):
            return self
        known = self.best if self.best is not None and self.best.metric == metric else None
        if known is not None and known.step != step and not _is_better(metric, value, known.value):
            return self
        return replace(self, best=Best(metric, step, value))

    def without(self, steps: Collection[int]) -> Tags:
        """After these were deleted, or written anew."""
        best = None if self.best is None or self.best.step in steps else self.best
        return Tags(self.good.difference(steps), self.suspect.difference(steps), best)

    def to_json(self) -> str:
        best = None if self.best is None else vars(self.best)
        return json.dumps({"good": sorted(self.good), "suspect": sorted(self.suspect), "best": best}) + "\n"


def parse_tags(text: str) -> Tags:
    """The inverse of ``Tags.to_json``.

    Raises:
        ValueError: not the content of a TAGS.json.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        best = content.get("best")
        return Tags(
            frozenset(map(int, content.get("good", ()))),
            frozenset(map(int, content.get("suspect", ()))),
            None if best is None else Best(str(best["metric"]), int(best["step"]), float(best["value"])),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not tags ({error!r})") from None


def resume_order(steps: Sequence[int], tags: Tags) -> list[int]:
    """Steps in the order in which a start tries them: newest first, suspect ones only when nothing else is left."""
    return sorted(steps, key=lambda step: (step in tags.suspect, -step))


def rewind_order(steps: Sequence[int], tags: Tags, *, onset: int) -> list[int]:
    """Steps in the order in which a rewind to before ``onset`` tries them.

    The newest good one with a margin before the onset, else the newest not suspect with it, else the newest before.
    """
    before = [step for step in steps if step < onset and step not in tags.suspect]

    def rank(step: int) -> tuple[bool, bool, int]:
        return (onset - step < MARGIN_STEPS, step not in tags.good, -step)

    return sorted(before, key=rank)


def lower_is_better(metric: str) -> bool:
    """Of losses and of ranks (the mean rank of the right caption, say); of everything else more is better."""
    return "loss" in metric.lower() or "rank" in metric.lower()


def _is_better(metric: str, value: float, than: float) -> bool:
    return value < than if lower_is_better(metric) else value > than
