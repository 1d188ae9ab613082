"""Collects Python's garbage in step: all ranks after the same step, and none of them in between.

A collection that Python starts by itself stops one rank for some tens of milliseconds, at a step of its own: with many
ranks somebody is always late, and all wait. What a step leaves behind is freed by reference counts alone; the rare
cycles wait for the next collection.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

_FIRST_STEPS = 3
"""They compile blocks and make optimizer states; what that leaves behind would lie there until the next collection."""


class CollectionInStep:
    """Context manager around the training loop: within it, Python does not collect by itself."""

    def __init__(self, every: int) -> None:
        """
        Args:
            every: steps between collections; 0 leaves all of it to Python.
        """
        self._every = every
        self._was_automatic = gc.isenabled()
        self._steps = 0

    def __enter__(self) -> Self:
        if self._every > 0:
            self._was_automatic = gc.isenabled()
            gc.collect()
            # Model, loader and imported modules stay to the end: no collection needs to look at them again.
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self._every > 0:
            gc.unfreeze()
            self._set_automatic(self._was_automatic)

    def after_step(self, step: int) -> None:
        """Collects if it is time, once after the first steps of a loop too: all ranks stand at the same step.

        Args:
            step: completed steps of the run.
        """
        self._steps += 1
        begins = self._steps == _FIRST_STEPS
        if self._every > 0 and (begins or step % self._every == 0):
            gc.collect()
            if begins:
                gc.freeze()  # programs stay to the end as well

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Around what is not a step and makes garbage of its own, an evaluation or a rewind: as Python does it, and
        clean at the end, where the ranks have to wait for each other anyway."""
        if self._every == 0:
            yield
            return
        self._set_automatic(self._was_automatic)
        try:
            yield
        finally:
            gc.disable()
            gc.collect()

    def _set_automatic(self, wanted: bool) -> None:
        if wanted:
            gc.enable()
        else:
            gc.disable()
