"""Two arms timed in alternating blocks, and what may be said about their ratio."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

Blocks = list[list[float]]
"""Step times of one arm in ms, one list per block."""


class Times(NamedTuple):
    """Both clocks of one arm."""

    wall: Blocks
    work: Blocks
    """Processor time of all threads together: still tells which arm has more to do when other programs share the
    machine. CPU runs only; no entries on CUDA."""


class Spread(NamedTuple):
    """Median and quartiles of the step times of one arm."""

    median_ms: float
    q25_ms: float
    q75_ms: float
    steps: int


class Ratio(NamedTuple):
    """How many times faster, with a bootstrap interval over blocks."""

    value: float
    low: float
    high: float


class Arm(NamedTuple):
    """One side of a comparison: ``prepare`` is not timed, ``step`` is."""

    prepare: Callable[[int], Any]
    """Makes the input of a step from its number."""
    step: Callable[[Any], object]


def time_block(
    arm: Arm, *, first_step: int, steps: int, device: torch.device, rewarm_steps: int = 0
) -> tuple[list[float], list[float]]:
    """Wall and processor times of steps in ms. On CUDA a pair of events per step, and one host sync for all.

    Args:
        rewarm_steps: before them and not timed. Nothing waits in between: the first timed step, too, finds the device
            at work, as every step of a run does.
    """
    for number in range(first_step, first_step + rewarm_steps):
        arm.step(arm.prepare(number))
    if device.type != "cuda":
        wall, work = zip(*(_time_on_cpu(arm, number) for number in range(first_step, first_step + steps)), strict=True)
        return list(wall), list(work)
    pairs = []
    for number in range(first_step, first_step + steps):
        batch = arm.prepare(number)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        arm.step(batch)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)  # host sync
    return [begin.elapsed_time(end) for begin, end in pairs], []


def _time_on_cpu(arm: Arm, number: int) -> tuple[float, float]:
    batch = arm.prepare(number)
    wall, work = time.perf_counter(), time.process_time()
    arm.step(batch)
    return (time.perf_counter() - wall) * 1000, (time.process_time() - work) * 1000


class Deadline:
    """Ends a measurement early, for all ranks alike."""

    def __init__(self, seconds: float | None, *, started: float, agree: Callable[[bool], bool] = bool) -> None:
        """
        Args:
            seconds: after ``started``, a reading of ``time.monotonic``; None is no limit.
            agree: makes one rank's answer everybody's.
        """
        self._end = None if seconds is None else started + seconds
        self._agree = agree

    def allows(self, seconds: float) -> bool:
        """Whether that much more time is left. Collective: all ranks."""
        return self._agree(self._end is None or time.monotonic() + seconds <= self._end)


def alternate(
    arms: Mapping[str, Arm],
    *,
    blocks: int,
    block_steps: int,
    rewarm_steps: int,
    device: torch.device,
    least_blocks: int = 1,
    deadline: Deadline | None = None,
    keep: Callable[[dict[str, Times]], None] | None = None,
) -> dict[str, Times]:
    """Blocks of steps in the order A B B A A B B A ..., so that a drift of the machine meets both arms alike.

    Args:
        rewarm_steps: at the start of a block are run and not counted: caches still hold the other arm's data.
        least_blocks: are measured however late it is; behind them no round begins that would not end in time.
        keep: is given all times so far after every round from the second on, that a process that is ended leaves them.
    """
    times = {name: Times([], []) for name in arms}
    for block in range(blocks):
        start = time.monotonic()
        order = list(arms) if block % 2 == 0 else list(arms)[::-1]
        for name in order:
            first_step = block * block_steps
            wall, work = time_block(
                arms[name], first_step=first_step, steps=block_steps, device=device, rewarm_steps=rewarm_steps
            )
            times[name].wall.append(wall)
            times[name].work.append(work)
            logger.info("block %d of %d, %s: %.1f ms", block + 1, blocks, name, statistics.median(wall))
        if keep is not None and block > 0:
            keep(times)
        is_late = deadline is not None and not deadline.allows(time.monotonic() - start)
        if is_late and least_blocks <= block + 1 < blocks:
            logger.info("no time for another block: %d of %d are measured", block + 1, blocks)
            break
    return times


def spread(blocks: Blocks) -> Spread:
    """Median and quartiles over all counted steps."""
    times = sorted(time_ms for block in blocks for time_ms in block)
    if len(times) < 2:
        raise ValueError(f"{len(times)} counted steps have no spread: pass --blocks and --block-steps for 2 or more")
    q25, median, q75 = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, q25, q75, len(times))


def speed_ratio(ours: Blocks, theirs: Blocks, *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Median step time of theirs / ours: above 1 we are faster. 95 % interval, resampling pairs of blocks."""
    draw = random.Random(seed)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = sorted(_median_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(resamples))
    return Ratio(_median_ratio(pairs), ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples)])


def _median_ratio(pairs: Sequence[tuple[list[float], list[float]]]) -> float:
    ours = statistics.median(time_ms for block, _ in pairs for time_ms in block)
    theirs = statistics.median(time_ms for _, block in pairs for time_ms in block)
    return theirs / ours
