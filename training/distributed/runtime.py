"""Who this process is among all, and on which device it computes.

Three ways to start are understood, variable by variable as in OpenCLIP: one process; ``torchrun`` (RANK, WORLD_SIZE,
LOCAL_RANK); ``srun`` (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID with MASTER_ADDR and MASTER_PORT exported).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from training.config import EngineConfig, ResilienceConfig
from training.distributed.failure import Guard
from training.distributed.flight_recorder import enable_recording

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long the first process waits for the last one to start: nodes of one job boot and import at different speeds."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits. NCCL's own 10 minutes are too short while one rank writes a checkpoint or compiles."""
_AFTER_THE_WATCHDOG = timedelta(minutes=2)
"""A collective that times out knows its own rank only; the watchdog compares all of them, so it comes first."""

_RANK_VARIABLES = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
_BACKENDS = {"cuda": "nccl", "hpu": "hccl", "npu": "hccl", "xpu": "xccl"}
_HOW_TO_START = (
    "start with torchrun, or with srun after exporting MASTER_ADDR=$(scontrol show hostnames "
    '"$SLURM_JOB_NODELIST" | head -n 1) and MASTER_PORT (any free port, e.g. 29500)'
)


@dataclass(frozen=True)
class Runtime:
    """This process among all."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    store: Store | None = field(default=None, repr=False, compare=False)
    """What all ranks can write to beside the collectives; None for a single process."""

    @property
    def is_main(self) -> bool:
        """True on one process of the job."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True on one process of each node."""
        return self.local_rank == 0


class Place(NamedTuple):
    """What the environment says about this process."""

    rank: int
    local_rank: int
    world_size: int


def start_runtime(config: EngineConfig, *, collective_timeout: timedelta = COLLECTIVE_TIMEOUT) -> Runtime:
    """Finds this process's place, joins the others, and chooses the device. All ranks must call it.

    Raises:
        ValueError: variables of the launcher that are missing or contradict each other; a device that is not there.
    """
    place = read_place(os.environ)
    if place.world_size == 1:
        return Runtime(*place, device=_choose_device(config, place))
    store = _meet(config.dist_url, place)
    enable_recording()
    # Guarded from here on: a rank that cannot get its device ends all others instead of letting them wait.
    with Guard(store, rank=place.rank, world_size=place.world_size):
        device = _choose_device(config, place)
        dist.init_process_group(
            backend=config.dist_backend or _BACKENDS.get(device.type, "gloo"),
            store=PrefixStore("process_group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=collective_timeout,
            # NCCL then knows its device from the start instead of guessing it at the first barrier.
            device_id=device if device.type == "cuda" else None,
        )
    return Runtime(*place, device=device, store=store)


def collective_timeout(config: ResilienceConfig) -> timedelta:
    """How long a collective waits where a watchdog ends what hangs: longer than the watchdog ever does."""
    longest = timedelta(seconds=max(config.timeout_start, config.timeout_step, config.timeout_evaluation))
    return max(COLLECTIVE_TIMEOUT, longest + _AFTER_THE_WATCHDOG)


def close_runtime(runtime: Runtime) -> None:
    """Leaves the process group. Call it after ``fail_together`` has ended, so that no rank still needs this one."""
    if runtime.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def read_place(environment: Mapping[str, str]) -> Place:
    """Rank, local rank and world size from a launcher's variables. Pure.

    Raises:
        ValueError: a variable that is missing, is not a number, or contradicts another.
    """
    world_size, source = _read_world_size(environment)
    if world_size == 1:
        return Place(0, 0, 1)
    rank = _read_first(environment, _RANK_VARIABLES)
    if rank is None:
        raise ValueError(
            f"{source}={world_size} but none of {', '.join(_RANK_VARIABLES)} is set, so this process does not know "
            f"which one it is: {_HOW_TO_START}; for a single process unset {source}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {source}={world_size} processes: ranks go from 0 to {world_size - 1}; a variable of "
            f"another launch is still exported. Unset {', '.join(_RANK_VARIABLES)} and WORLD_SIZE, then {_HOW_TO_START}"
        )
    _check_slurm_agrees(environment, world_size)
    return Place(rank, _read_first(environment, _LOCAL_RANK_VARIABLES) or 0, world_size)


def _read_world_size(environment: Mapping[str, str]) -> tuple[int, str]:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if name in environment:
            world_size = _read_number(environment, name)
            if world_size < 1:
                raise ValueError(f"{name}={world_size}: must be at least 1; unset it for a single process")
            return world_size, name
    return 1, ""


def _check_slurm_agrees(environment: Mapping[str, str], world_size: int) -> None:
    """An exported WORLD_SIZE that srun does not fill leaves everybody waiting for ranks that never start."""
    started_by_srun = "RANK" not in environment and "SLURM_PROCID" in environment
    tasks = _read_number(environment, "SLURM_NTASKS") if "SLURM_NTASKS" in environment else world_size
    if started_by_srun and tasks != world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but srun started SLURM_NTASKS={tasks} tasks: unset WORLD_SIZE, or give "
            f"--ntasks={world_size} (nodes x tasks per node)"
        )


def _read_first(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_read_number(environment, name) for name in names if name in environment), None)


def _read_number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r} is not a whole number: {_HOW_TO_START}")
    return int(text)


def _meet(dist_url: str | None, place: Place) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT or at --dist-url, connected. collective: all ranks."""
    url = dist_url or "env://"
    if url.startswith("env://"):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"{place.world_size} processes but {' and '.join(missing)} not set, so they cannot find each other: "
                f"{_HOW_TO_START}, or pass --dist-url tcp://HOST:PORT"
            )
        _read_number(os.environ, "MASTER_PORT")
    elif not url.startswith(("tcp://", "file://")):
        raise ValueError(f"--dist-url {url}: give env://, tcp://HOST:PORT or file:///PATH")
    # Libraries that look at the environment themselves find the same answer under srun as under torchrun.
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world_size))
    store: Store = next(iter(rendezvous(url, place.rank, place.world_size, timeout=RENDEZVOUS_TIMEOUT)))[0]
    return store


def _choose_device(config: EngineConfig, place: Place) -> torch.device:
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"--device {config.device}: not a device ({error}); give cuda, cuda:N, mps or cpu") from error
    if not _is_available(device.type):
        logger.warning("--device %s is not available on this machine: using cpu", config.device)
        return torch.device("cpu")
    if device.type != "cuda":
        return device
    device = _choose_cuda_device(device, config, place)
    torch.cuda.set_device(device)
    return device


def _choose_cuda_device(device: torch.device, config: EngineConfig, place: Place) -> torch.device:
    count = torch.cuda.device_count()
    if place.world_size == 1 or config.no_set_device_rank:
        index = torch.cuda.current_device() if device.index is None else device.index
    else:
        if device.index is not None:
            logger.warning("--device %s: the index is ignored, each process takes its local rank", config.device)
        index = place.local_rank
    if index >= count:
        raise ValueError(
            f"cuda:{index} for local rank {place.local_rank}, but {count} CUDA device(s) are visible: start as many "
            "processes per node as there are GPUs, or pass --no-set-device-rank if each process sees only its own "
            "(srun --gpus-per-task=1)"
        )
    return torch.device("cuda", index)


def _is_available(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_available()
    if device_type == "mps":
        return torch.backends.mps.is_available()
    return True  # cpu, and types that only their own plug-in can judge: tried, and refused there
