"""Decides which step checkpoints may go: a pure function of the steps on disk, and of what is known about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from training.checkpoint.tags import Tags


def steps_to_delete(
    steps: Sequence[int], *, keep: int, every: int = 0, tags: Tags | None = None, verified: Collection[int]
) -> list[int]:
    """What may go, oldest first.

    There stay: the newest ``keep`` that are not suspect (suspect ones while they are among the newest of all), every
    ``every``-th step, the best by metric, and the newest that is tagged good. Nothing goes unless one of those that
    stay and are not suspect has been read back.

    Args:
        keep: at least 2, since the newest may turn out to be damaged.
        every: multiples of this step stay for good; 0 keeps none.
        verified: steps that were read back by this process, or by its start.
    """
    if keep < 2:
        raise ValueError(f"keep={keep} would leave nothing to fall back to: pass --keep-checkpoints 2 or more.")
    tags = tags or Tags()
    ordered = sorted(steps)
    sound = [step for step in ordered if step not in tags.suspect]
    staying = {*sound[-keep:], *(set(ordered[-keep:]) & tags.suspect)}
    staying |= {step for step in sound if every > 0 and step % every == 0}
    staying |= set([step for step in ordered if step in tags.good][-1:])
    if tags.best is not None:
        staying.add(tags.best.step)
    if not any(step in verified for step in staying.intersection(sound)):
        return []
    return [step for step in ordered if step not in staying]
