"""A process finds its place from a launcher's variables, and says what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from tests.distributed.jobs import main_at
from tests.distributed.launch import current_runtime, free_port, run_ranks, start_ranks
from training.config import EngineConfig, ResilienceConfig
from training.distributed.collectives import all_reduce_sum, barrier
from training.distributed.flight_recorder import FlightRecorder, LastCollective, enable_recording
from training.distributed.meeting import Seat
from training.distributed.runtime import (
    Place,
    Runtime,
    check_devices,
    choose_device,
    collective_timeout,
    read_place,
    read_srun_task,
    start_runtime,
)

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
ONE_TASK = SRUN | {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "node0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 0, 1)),
        (TORCHRUN, Place(3, 1, 4)),
        (SRUN, Place(5, 1, 8)),
        # torchrun inside of an allocation: its own variables are the answer.
        (SRUN | TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, Place(3, 1, 4)),
        # Some scripts export WORLD_SIZE and leave the rest to srun, some all of it.
        (SRUN | {"WORLD_SIZE": "8"}, Place(5, 1, 8)),
        (SRUN | {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Place(5, 1, 8)),
        # Left over from another launch, and of no use to anybody.
        (SRUN | {"LOCAL_RANK": "0"}, Place(5, 1, 8)),
        # One task of an allocation, torchrun with one process, and torchrun below such a task.
        (ONE_TASK, Place(0, 0, 1)),
        (ONE_TASK | TORCHRUN, Place(3, 1, 4)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, Place(0, 0, 1)),
        # mpirun in a batch script.
        (BATCH_SCRIPT | {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, Place(6, 2, 8)),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "1"}, Place(0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Place(2, 0, 4)),
    ],
)
def test_the_place_is_read_from_any_launcher(environment, place):
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 but none of RANK.*start with torchrun, or with srun"),
        (TORCHRUN | {"RANK": "4"}, r"rank 4 of WORLD_SIZE=4 processes: ranks go from 0 to 3"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four' is not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be at least 1"),
        (SRUN | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 but srun started SLURM_NTASKS=8 tasks: unset WORLD_SIZE"),
        # Eight runs of one process each, all in the same directory.
        (SRUN | {"WORLD_SIZE": "1"}, "WORLD_SIZE=1 but srun started SLURM_NTASKS=8 tasks: unset WORLD_SIZE"),
        (SRUN | {"WORLD_SIZE": "1", "RANK": "0"}, "WORLD_SIZE=1 but srun started SLURM_NTASKS=8 tasks"),
        (SRUN | {"RANK": "0"}, "RANK=0 but srun made this process SLURM_PROCID=5: RANK is left over.*unset RANK"),
        (BATCH_SCRIPT, "SLURM_NTASKS=8 tasks, but this process was not started by srun: put srun before python"),
    ],
)
def test_contradicting_variables_are_refused_with_a_remedy(environment, message):
    with pytest.raises(ValueError, match=message):
        read_place(environment)


def test_a_single_process_has_no_group():
    runtime = start_runtime(EngineConfig(device="cpu"))
    assert runtime == Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    assert runtime.is_main
    assert runtime.is_local_main
    assert not torch.distributed.is_initialized()


def test_a_device_that_is_not_there_falls_back_to_the_cpu_with_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert start_runtime(EngineConfig(device="cuda")).device.type == "cpu"
    assert "--device cuda is not available on this machine: using cpu" in caplog.text


def test_a_device_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="--device toaster: not a device"):
        start_runtime(EngineConfig(device="toaster"))


def test_more_processes_than_gpus_are_refused_with_the_flag_to_pass(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"cuda:1 for local rank 0, but 1 CUDA device\(s\).*--no-set-device-rank"):
        start_runtime(EngineConfig(device="cuda:1"))


def test_more_tasks_than_gpus_on_a_node_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    task = read_srun_task(SRUN)
    message = r"cuda:3 for local rank 3 of 4 tasks on node1, but 2 CUDA device\(s\).*--ntasks-per-node"
    with pytest.raises(ValueError, match=message):
        choose_device(EngineConfig(), Place(7, 3, 8), task)


def test_a_task_that_sees_one_gpu_takes_it_and_idle_gpus_are_named(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device(EngineConfig(), Place(7, 3, 8), read_srun_task(SRUN)) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_device(EngineConfig(), Place(4, 0, 8), read_srun_task(SRUN)) == torch.device("cuda", 0)
    assert "4 tasks on node1, which has 8 GPUs: the others idle" in caplog.text


def test_ranks_on_different_kinds_of_devices_are_refused():
    store, cuda, cpu = HashStore(), torch.device("cuda", 0), torch.device("cpu")
    check_devices(store, cpu, Seat(0, 8, None), uses_nccl=False)
    with pytest.raises(
        RuntimeError, match=r"rank 5 on node1 would compute on cuda, but it is cpu on rank 0 on .*--exclude"
    ):
        check_devices(store, cuda, Seat(5, 8, read_srun_task(SRUN)), uses_nccl=False)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    store, device = HashStore(), torch.device("cuda", 0)
    check_devices(store, device, Seat(0, 8, None), uses_nccl=True)
    with pytest.raises(
        ValueError, match="rank 5 on node1 and rank 0 on .* have one and the same GPU.*--gpus-per-task=1"
    ):
        check_devices(store, device, Seat(5, 8, read_srun_task(SRUN)), uses_nccl=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    check_devices(store, device, Seat(6, 8, None), uses_nccl=True)


def place_and_backend() -> tuple[int, int, bool, str]:
    runtime = current_runtime()
    return runtime.rank, runtime.world_size, runtime.is_main, torch.distributed.get_backend()


def test_two_processes_on_cpus_form_a_gloo_group():
    assert run_ranks(2, place_and_backend) == [(0, 2, True, "gloo"), (1, 2, False, "gloo")]


def test_processes_meet_at_the_address_of_dist_url():
    ranks = start_ranks(2, main_at, f"tcp://127.0.0.1:{free_port()}")
    for process in ranks:
        process.join(timeout=30)
    assert [process.exitcode for process in ranks] == [0, 0]


def test_a_collective_waits_longer_than_the_watchdog():
    """Whichever of its times is the longest; and never less than without one."""
    short = ResilienceConfig(timeout_start=5, timeout_step=5, timeout_evaluation=5)
    assert collective_timeout(short) == timedelta(minutes=30)
    assert collective_timeout(ResilienceConfig()) == timedelta(minutes=62)
    assert collective_timeout(ResilienceConfig(timeout_step=7200)) == timedelta(minutes=122)


def last_collectives(directory: Path) -> tuple[LastCollective | None, LastCollective | None, bool]:
    before = FlightRecorder().last()
    barrier()
    all_reduce_sum(torch.ones(1))
    FlightRecorder().write(directory / f"{current_runtime().rank}.json")
    return before, FlightRecorder().last(), "TORCH_FR_BUFFER_SIZE" in os.environ


def test_the_last_collective_of_a_rank_is_on_record(tmp_path):
    for before, after, is_set in run_ranks(2, last_collectives, tmp_path):
        assert before is None
        assert after == LastCollective("all_reduce", 2, started=-1, waiting=False)
        assert is_set
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


@pytest.mark.parametrize("name", ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"])
def test_a_given_size_of_the_record_is_kept(name):
    environment = {name: "7"}
    enable_recording(environment)
    assert environment == {name: "7"}


RECORD = {
    "entries": [
        {"is_p2p": False, "pg_id": 0, "record_id": 5, "collective_seq_id": 6, "retired": False}
        | {"profiling_name": "BACKEND:all_gather"}
    ],
    "pg_status": {"0": {"last_started_collective": 6}},
}


@pytest.fixture
def recorders(monkeypatch) -> dict[str, bytes]:
    """What each backend's recorder holds, by the functions that torch 2.15 has; gloo's holds nothing."""
    held: dict[str, bytes] = {}
    c10d = torch._C._distributed_c10d

    def dump(*, backend: str = "gloo") -> bytes:
        return held.get(backend, b"{}")

    # NCCL's is not among those that the other function knows.
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", dump)
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: held.get("NCCL", b"{}"), raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return held


@pytest.mark.parametrize(
    ("backend", "devices", "recorder"),
    [
        ("nccl", "cpu:nccl,cuda:nccl", "NCCL"),
        ("undefined", "cpu:gloo,cuda:nccl", "NCCL"),
        ("xccl", "cpu:xccl,xpu:xccl", "xccl"),
    ],
)
def test_the_record_is_that_of_the_groups_backend(monkeypatch, recorders, backend, devices, recorder):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: devices)
    assert FlightRecorder().last() is None
    recorders[recorder] = json.dumps(RECORD).encode()
    assert FlightRecorder().last() == LastCollective("all_gather", 6, started=6, waiting=True)


def test_an_older_torch_that_knows_no_backends_is_asked_for_its_only_record(monkeypatch, recorders):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo")
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_fr_trace_json", lambda: json.dumps(RECORD).encode())
    assert FlightRecorder().last() is not None


def test_a_single_process_has_no_record(tmp_path):
    assert FlightRecorder().last() is None
    FlightRecorder().write(tmp_path / "record.json")
    assert not list(tmp_path.iterdir())
