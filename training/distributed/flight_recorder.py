"""The last collectives of this process, from the recorder that torch keeps for every backend.

A record costs less than a microsecond and nothing is written until somebody asks. Variables and format are the same
for all backends; recorders are not: NCCL has one of its own with its own function, and the other function answers for
gloo unless it is told the backend (torch 2.15; torch 2.11 has one recorder for all but NCCL, and no such argument).
Source: torch's FlightRecorder.{hpp,cpp} and FlightRecorderCuda.cpp.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_NUM_RECORDS = "2000"
"""Some steps' worth. NCCL's records carry stacks and sizes: about 1 kB each."""
_SIZE_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


class LastCollective(NamedTuple):
    """The newest collective of the group of all ranks that this process has asked for."""

    name: str
    number: int
    """All ranks count alike: the one with the lower number is behind."""
    started: int
    """The newest one that runs on the device; -1 where the backend does not tell."""
    waiting: bool
    """Whether it is not done."""


def enable_recording(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps the last collectives, unless a variable of torch says how many. Before the first process group."""
    if not any(name in environment for name in _SIZE_VARIABLES):
        environment[_SIZE_VARIABLES[0]] = _NUM_RECORDS


class FlightRecorder:
    """What torch has recorded in this process."""

    def last(self) -> LastCollective | None:
        """None if there was no collective, or nothing is recorded."""
        record = _read()
        entries = [entry for entry in record.get("entries", ()) if not entry["is_p2p"] and entry["pg_id"] == 0]
        if not entries:
            return None
        newest = max(entries, key=lambda entry: int(entry["record_id"]))
        status = record.get("pg_status", {}).get("0", {})
        return LastCollective(
            name=newest["profiling_name"].rpartition(":")[2],
            number=int(newest["collective_seq_id"]),
            started=int(status.get("last_started_collective", -1)),
            waiting=not newest["retired"],
        )

    def write(self, path: Path) -> None:
        """All that is recorded, as JSON; nothing if nothing is."""
        record = _read()
        if record.get("entries"):
            path.write_text(json.dumps(record, indent=1))


def _read() -> dict[str, Any]:
    """Of the recorder that the group of all ranks writes to; empty without a group or a recorder."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    record: dict[str, Any] = json.loads(_dump(dist.get_backend(), dist.get_backend_config()) or "{}")
    return record


def _dump(backend: str, device_backends: str) -> bytes | None:
    """
    Args:
        backend: of the group.
        device_backends: by device, ``cpu:gloo,cuda:nccl``; where one of them is NCCL, training goes through that.
    """
    c10d = torch._C._distributed_c10d
    if "nccl" in device_backends:
        nccl: bytes | None = c10d._dump_nccl_trace_json() if hasattr(c10d, "_dump_nccl_trace_json") else None
        return nccl
    if not hasattr(c10d, "_dump_fr_trace_json"):
        return None
    dump: Callable[..., bytes] = c10d._dump_fr_trace_json
    try:
        return dump(backend=backend)
    except TypeError:  # the argument is younger than torch 2.11
        return dump()
