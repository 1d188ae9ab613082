"""Decides which step checkpoints may go: a pure function of the steps on disk, and of what is known about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from training.checkpoint.tags import Tags

FEWEST = 2
"""What a run never has fewer of, as soon as it has them: the newest may turn out to be damaged."""


def steps_to_delete(
    steps: Sequence[int],
    *,
    keep: int,
    every: int = 0,
    tags: Tags | None = None,
    verified: Collection[int],
    damaged: Collection[int] = (),
) -> list[int]:
    """What may go, oldest first.

    There stay: the newest ``keep`` that are not suspect (suspect ones while they are among the newest of all), every
    ``every``-th step, the best by metric, and the newest that is tagged good. Nothing goes unless one of those that
    stay and are not suspect has been read back. Damaged ones count for nothing, and go when ``keep`` others are there.

    Args:
        keep: at least 2, since the newest may turn out to be damaged.
        every: multiples of this step stay for good; 0 keeps none.
        verified: steps that were read back by this process.
        damaged: steps whose checkpoint this process has found not to be what was written.
    """
    if keep < FEWEST:
        raise ValueError(f"keep={keep} would leave nothing to fall back to: pass --keep-checkpoints 2 or more.")
    tags = tags or Tags()
    ordered = sorted(steps)
    sound = newest_sound(ordered, count=len(ordered), tags=tags, damaged=damaged)
    staying = {*sound[-keep:], *(set(ordered[-keep:]) & tags.suspect)}
    staying |= set(damaged) if len(sound) < keep else set()
    staying |= {step for step in sound if every > 0 and step % every == 0}
    staying |= set([step for step in sound if step in tags.good][-1:])
    if tags.best is not None:
        staying.add(tags.best.step)
    if not any(step in verified for step in staying.intersection(sound)):
        return []
    return [step for step in ordered if step not in staying]


def newest_sound(
    steps: Sequence[int], *, count: int, tags: Tags | None = None, damaged: Collection[int] = ()
) -> list[int]:
    """The newest steps, ascending, that are neither suspect nor damaged."""
    suspect = tags.suspect if tags is not None else ()
    return [step for step in sorted(steps) if step not in suspect and step not in damaged][-count:]
