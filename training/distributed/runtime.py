"""Who this process is among all, and on which device it computes.

Three ways to start are understood: one process; ``torchrun``, or whatever sets RANK, WORLD_SIZE and LOCAL_RANK;
``srun``, whose own variables are enough.
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

from slurm.environment import Task, is_in_job, read_task
from training.config import EngineConfig, ResilienceConfig
from training.distributed.failure import Guard
from training.distributed.flight_recorder import enable_recording
from training.distributed.meeting import Seat
from training.distributed.rendezvous import RENDEZVOUS_TIMEOUT, meet

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a collective waits. NCCL's own 10 minutes are too short while one rank writes a checkpoint or compiles."""
_AFTER_THE_WATCHDOG = timedelta(minutes=2)
"""A collective that times out knows its own rank only; the watchdog compares all of them, so it comes first."""

# SLURM_PROCID is not among them: srun's variables are read as a whole, and a batch script has one too.
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_BACKENDS = {"cuda": "nccl", "hpu": "hccl", "npu": "hccl", "xpu": "xccl"}
_HOW_TO_START = "start with torchrun, or with srun (one task per device)"


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


def start_runtime(
    config: EngineConfig,
    *,
    collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
    rendezvous_timeout: timedelta = RENDEZVOUS_TIMEOUT,
) -> Runtime:
    """Finds this process's place, joins the others, and chooses the device. All ranks must call it.

    Raises:
        ValueError: variables of the launcher that are missing or contradict each other; an address at which nobody
            can meet; a device that is not there.
        RuntimeError: a name that is not known, a port that is taken, ranks that do not come within
            ``rendezvous_timeout``, nodes that differ.
    """
    task = read_srun_task(os.environ)
    place = read_place(os.environ)
    if place.world_size == 1:
        return Runtime(*place, device=choose_device(config, place, task))
    # Libraries that look at the environment themselves find the same answer under srun as under torchrun.
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world_size))
    seat = Seat(place.rank, place.world_size, task)
    store = meet(config.dist_url, seat, suffix=config.slurm_host_suffix, timeout=rendezvous_timeout)
    enable_recording()
    # Guarded from here on: a rank that cannot get its device ends all others instead of letting them wait.
    with Guard(store, rank=place.rank, world_size=place.world_size):
        device = choose_device(config, place, task)
        check_devices(PrefixStore("devices", store), device, seat, uses_nccl=_uses_nccl(config, device))
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
    task = read_srun_task(environment)
    if task is not None:
        return Place(task.rank, task.local_rank, task.world_size)
    world_size, source = _read_world_size(environment)
    if world_size == 1:
        return Place(0, 0, 1)
    rank = _read_first(environment, _RANK_VARIABLES)
    if rank is None and source == "SLURM_NTASKS":
        raise ValueError(
            f"the job has SLURM_NTASKS={world_size} tasks, but this process was not started by srun: put srun before "
            "python, so that there is one process per task; for a single process of its own, srun --ntasks=1"
        )
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
    return Place(rank, _read_first(environment, _LOCAL_RANK_VARIABLES) or 0, world_size)


def read_srun_task(environment: Mapping[str, str]) -> Task | None:
    """This process as srun sees it; None if it was not srun that made it a rank, but a launcher below it. Pure.

    Raises:
        ValueError: variables of another launch that are still exported. With them each task would train on its own,
            or all would wait for ranks that never start.
    """
    task = read_task(environment)
    if task is None or "TORCHELASTIC_RUN_ID" in environment:
        return None
    given = {name: _read_number(environment, name) for name in ("RANK", "WORLD_SIZE") if name in environment}
    world_size = given.get("WORLD_SIZE", task.world_size)
    if "RANK" in given and world_size > task.world_size:
        return None  # another launcher, one task per node
    if world_size != task.world_size:
        raise ValueError(
            f"WORLD_SIZE={world_size} but srun started SLURM_NTASKS={task.world_size} tasks: unset WORLD_SIZE, or give "
            f"--ntasks={world_size} (nodes x tasks per node)"
        )
    if given.get("RANK", task.rank) != task.rank:
        raise ValueError(
            f"RANK={given['RANK']} but srun made this process SLURM_PROCID={task.rank}: RANK is left over from another "
            "launch; unset RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return task


def _read_world_size(environment: Mapping[str, str]) -> tuple[int, str]:
    names = ("WORLD_SIZE", "SLURM_NTASKS") if is_in_job(environment) else ("WORLD_SIZE",)
    for name in names:
        if name in environment:
            world_size = _read_number(environment, name)
            if world_size < 1:
                raise ValueError(f"{name}={world_size}: must be at least 1; unset it for a single process")
            return world_size, name
    return 1, ""


def _read_first(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_read_number(environment, name) for name in names if name in environment), None)


def _read_number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r} is not a whole number: {_HOW_TO_START}")
    return int(text)


def choose_device(config: EngineConfig, place: Place, task: Task | None) -> torch.device:
    """The device of this process's local rank.

    Raises:
        ValueError: no such device.
    """
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"--device {config.device}: not a device ({error}); give cuda, cuda:N, mps or cpu") from error
    if not _is_available(device.type):
        logger.warning("--device %s is not available on this machine: using cpu", config.device)
        return torch.device("cpu")
    if device.type != "cuda":
        return device
    device = _choose_cuda_device(device, config, place, task)
    torch.cuda.set_device(device)
    return device


def _choose_cuda_device(device: torch.device, config: EngineConfig, place: Place, task: Task | None) -> torch.device:
    count = torch.cuda.device_count()
    if place.world_size == 1 or config.no_set_device_rank:
        index = torch.cuda.current_device() if device.index is None else device.index
    elif count == 1 and _uses_nccl(config, device):
        index = 0  # srun --gpus-per-task=1 shows each task its own; if all see the same one, they find out together
    else:
        if device.index is not None:
            logger.warning("--device %s: the index is ignored, each process takes its local rank", config.device)
        index = place.local_rank
    if index >= count:
        tasks = f" of {task.tasks_on_node} tasks on {task.node}" if task is not None else ""
        raise ValueError(
            f"cuda:{index} for local rank {place.local_rank}{tasks}, but {count} CUDA device(s) are visible: start as "
            "many processes per node as there are GPUs (srun --ntasks-per-node, --gres=gpu:N), or pass "
            "--no-set-device-rank if each process sees only its own (srun --gpus-per-task=1)"
        )
    if task is not None and place.local_rank == 0 and 1 < task.tasks_on_node < count:
        logger.warning("%d tasks on %s, which has %d GPUs: the others idle", task.tasks_on_node, task.node, count)
    return torch.device("cuda", index)


def _uses_nccl(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cuda" and config.dist_backend in (None, "nccl")


def check_devices(store: Store, device: torch.device, seat: Seat, *, uses_nccl: bool) -> None:
    """Two requests to the store for what NCCL notices late, or by hanging.

    Raises:
        RuntimeError: another rank computes on another kind of device.
        ValueError: another rank has the same GPU.
    """
    first = store.compare_set("type", "", f"{device.type} on {seat.name}").decode()
    if first.split()[0] != device.type:
        raise RuntimeError(
            f"{seat.name} would compute on {device.type}, but it is {first}: one of the nodes does not show "
            "its GPUs (driver, --gres); leave it out with --exclude, or give --device cpu to all"
        )
    if uses_nccl:
        holder = store.compare_set(f"device/{_device_name(device)}", "", seat.name).decode()
        if holder != seat.name:
            raise ValueError(
                f"{seat.name} and {holder} have one and the same GPU: start as many tasks per node as there are GPUs, "
                "and ask for them (srun --gres=gpu:N, or --gpus-per-task=1)"
            )


def _device_name(device: torch.device) -> str:
    """The same for two processes only if they share it; parts of one GPU (MIG) are told apart by their own names."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    part = visible[index] if index < len(visible) and visible[index].startswith("MIG-") else ""
    return f"{torch.cuda.get_device_properties(index).uuid} {part}"


def _is_available(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_available()
    if device_type == "mps":
        return torch.backends.mps.is_available()
    return True  # cpu, and types that only their own plug-in can judge: tried, and refused there
