"""Which samples every step consumed: written by ``--trace-samples``, read by ``clipyard data trace`` and by tests.

    RUN/trace/rank_00000.bin    records of 12 bytes: step, slot, raw index (little-endian uint32), in order
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

logger = logging.getLogger(__name__)

TRACE_DIRECTORY = "trace"
RECORD = np.dtype([("step", "<u4"), ("slot", "<u4"), ("raw_index", "<u4")])

Records = npt.NDArray[np.void]


class SampleTrace:
    """Appends to one rank's file. What a killed run wrote of steps that it lost is removed on opening."""

    def __init__(self, directory: Path, *, rank: int, first_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank_{rank:05d}.bin"
        truncate_trace(path, first_step=first_step)
        self._file = path.open("ab", buffering=0)
        self._ended = False

    def append(self, step: int, samples: Tensor) -> None:
        """Records the samples [B, columns slot, raw index, ...] of one batch of ``step``."""
        records = np.empty(len(samples), dtype=RECORD)
        records["step"] = step
        records["slot"], records["raw_index"] = samples[:, 0].numpy(), samples[:, 1].numpy()
        if self._ended:
            return
        try:
            self._file.write(records.tobytes())
        except OSError as error:
            self._ended = True
            logger.error("The sample trace of this start ends before step %d: %s.", step, error)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def truncate_trace(path: Path, *, first_step: int) -> None:
    """Removes the records of ``first_step`` and later ones, and a torn one at the end.

    A new file takes the place of the old: a process that was taken for dead, and wakes up, appends to one that has no
    name any more.
    """
    if not path.exists():
        return
    records = _read(path)
    kept = records[: int(np.searchsorted(records["step"], first_step))]
    staging = path.with_suffix(".tmp")
    staging.write_bytes(kept.tobytes())
    staging.replace(path)


def truncate_other_ranks(directory: Path, *, world_size: int, first_step: int) -> None:
    """The same for ranks of a larger world that this one has not."""
    for path in directory.glob("rank_*.bin"):
        if int(path.stem.removeprefix("rank_")) >= world_size:
            truncate_trace(path, first_step=first_step)


def read_trace(directory: Path, *, step: int | None = None) -> dict[int, Records]:
    """Records by rank, of one step or of all."""
    traces = {int(path.stem.removeprefix("rank_")): _read(path) for path in sorted(directory.glob("rank_*.bin"))}
    if step is None:
        return traces
    found = {rank: records[records["step"] == step] for rank, records in traces.items()}
    return {rank: records for rank, records in found.items() if len(records)}


def _read(path: Path) -> Records:
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
