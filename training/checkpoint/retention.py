"""Decides which step checkpoints may go: a pure function of the steps on disk."""

from __future__ import annotations

from collections.abc import Sequence


def steps_to_delete(steps: Sequence[int], *, keep: int) -> list[int]:
    """All but the newest ``keep`` steps, oldest first. At least 2 stay: the newest may turn out to be damaged."""
    if keep < 2:
        raise ValueError(f"keep={keep} would leave nothing to fall back to: pass --keep-checkpoints 2 or more.")
    return sorted(steps)[:-keep]
