"""Processes find each other, or say in seconds why they cannot."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from slurm.environment import Task, master_ports, read_task
from tests.distributed.launch import free_port
from training.config import EngineConfig
from training.distributed import meeting, rendezvous
from training.distributed.meeting import Seat, check_address, choose_meeting
from training.distributed.rendezvous import meet
from training.distributed.runtime import start_runtime

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "nodea,nodeb",
}
SECONDS = timedelta(seconds=2)


def seat(rank: int, **change: str) -> Seat:
    """A task of two on nodea and one on nodeb."""
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2)}
    task = read_task(STEP | place | change)
    assert task is not None
    return Seat(rank, task.world_size, task)


def gather(seats: list[Seat], timeout: timedelta = SECONDS) -> list[str]:
    """What each of them is told, each in a thread of its own; empty for a store."""

    kept = []  # rank 0's store serves the others

    def one(seat: Seat) -> str:
        try:
            kept.append(meet(None, seat, suffix="", timeout=timeout))
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(seats)) as threads:
        return list(threads.map(one, seats))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine is every node."""
    monkeypatch.setattr(meeting, "master_address", lambda task, suffix: "127.0.0.1")
    monkeypatch.setattr(meeting, "_is_loopback", lambda host: False)
    monkeypatch.setattr(rendezvous, "PORT_PATIENCE_S", 0.5)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # what a rank publishes is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Another program's port; it answers to nothing."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server


def choose(environment: dict[str, str], task: Task | None, suffix: str = "auto") -> tuple[str, tuple[int, ...]]:
    found = choose_meeting("env://", environment, Seat(0, 3, task), suffix=suffix)
    return found.host, found.ports


def test_what_is_exported_wins_over_what_srun_says():
    task = seat(0).task
    assert task is not None
    assert choose({}, task) == ("nodea", master_ports(task))
    assert choose({"SYSTEMNAME": "juwelsbooster"}, task) == ("nodeai", master_ports(task))
    assert choose({"SYSTEMNAME": "juwelsbooster"}, task, suffix="") == ("nodea", master_ports(task))
    assert choose({"MASTER_PORT": "12802"}, task) == ("nodea", (12802,))
    assert choose({"MASTER_ADDR": "x"}, task) == ("x", master_ports(task))
    assert choose({"MASTER_ADDR": "x", "MASTER_PORT": "1"}, None) == ("x", (1,))


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("env://", {}, "3 processes but MASTER_ADDR and MASTER_PORT not set.*start with torchrun or srun"),
        ("env://", {"MASTER_ADDR": "x"}, "3 processes but MASTER_PORT not set"),
        ("env://", {"MASTER_ADDR": "x", "MASTER_PORT": "auto"}, "MASTER_PORT='auto' is not a port"),
        ("env://", {"MASTER_ADDR": "x", "MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a port"),
        ("tcp://node1", {}, "--dist-url tcp://node1: give host and port, as in tcp://node1:29500"),
    ],
)
def test_an_address_that_is_none_is_refused(url, environment, message):
    with pytest.raises(ValueError, match=message):
        choose_meeting(url, environment, Seat(0, 3, None), suffix="auto")


def test_an_address_of_another_kind_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--dist-url http://host: give env://, tcp://HOST:PORT or file:///PATH"):
        start_runtime(EngineConfig(device="cpu", dist_url="http://host"))


def check(host: str, seat: Seat) -> None:
    check_address(choose_meeting("env://", {"MASTER_ADDR": host, "MASTER_PORT": "1"}, seat, suffix=""), seat)


def test_a_name_that_does_not_resolve_is_refused_with_name_node_and_source(monkeypatch):
    monkeypatch.setattr(meeting, "_RESOLVE_PAUSE_S", 0.0)
    message = (
        r"rank 2 on nodeb cannot resolve 'no-such.invalid' \(.*from MASTER_ADDR=no-such.invalid.*--slurm-host-suffix"
    )
    with pytest.raises(RuntimeError, match=message):
        check("no-such.invalid", seat(2))
    with pytest.raises(
        RuntimeError, match=r"rank 1 on .* cannot resolve .*: export MASTER_ADDR as this node can reach it"
    ):
        check("no-such.invalid", Seat(1, 2, None))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_loopback_address_among_several_nodes_is_refused(host):
    with pytest.raises(ValueError, match=f"MASTER_ADDR={host} .* is every node itself, but the ranks run on 2 nodes"):
        check(host, seat(2))
    check(host, seat(0, SLURM_STEP_NODELIST="nodea", SLURM_STEP_TASKS_PER_NODE="3"))


def test_rank_zero_refuses_an_address_of_another_machine():
    """192.0.2.0/24 is reserved for examples: nobody has it."""
    with pytest.raises(ValueError, match=r"rank 0 runs on nodea, but MASTER_ADDR=192.0.2.7.*export MASTER_ADDR=nodea"):
        check("192.0.2.7", seat(0))
    check("192.0.2.7", seat(1))  # which may well be on another machine


def test_the_ranks_of_a_step_meet_at_the_next_port_where_the_first_is_taken(here):
    here.setenv("MASTER_PORT", "")  # exported, and empty
    here.setattr(rendezvous, "_PROBE_S", 0.3)
    first, second, *_ = master_ports(seat(0).task)
    with socket.create_server(("0.0.0.0", first)) as server:
        server.settimeout(0.05)
        threading.Thread(target=_hang_up_on_all, args=(server,), daemon=True).start()
        assert gather([seat(rank) for rank in range(3)], timeout=timedelta(seconds=30)) == ["", "", ""]
    assert os.environ["MASTER_PORT"] == str(second)


def _hang_up_on_all(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except TimeoutError:
            continue
        except OSError:
            return


def test_a_port_that_is_taken_is_named_with_its_process_on_rank_zero_and_on_the_others(here, listener):
    here.setenv("MASTER_PORT", str(port := listener.getsockname()[1]))
    here.setattr(rendezvous, "_PROBE_S", 0.2)
    texts = gather([seat(0), seat(1)], timeout=timedelta(seconds=20))
    taken = f"RuntimeError: port {port} of 127.0.0.1 .from MASTER_PORT={port}.* is taken"
    assert re.search(f"{taken}: rank 0 on nodea cannot listen there, it belongs to process {os.getpid()} ", texts[0])
    assert re.search(f"{taken}: rank 1 on nodea finds no rank 0 there, it belongs to a program that does not", texts[1])
    assert all("unset MASTER_PORT, so that each start takes a port of its own" in text for text in texts)


def test_nobody_joins_the_store_of_another_job(here):
    """Two jobs with the same exported port, as the historical scripts have it, on one node."""
    here.setenv("MASTER_PORT", str(port := free_port()))
    other = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), False)
    other.set("clipyard/signature", "job 6 step 0 restart 0")
    before = other.num_keys()
    (text,) = gather([seat(1)], timeout=timedelta(seconds=20))
    assert "rank 1 on nodea finds no rank 0 there, it belongs to job 6 step 0 restart 0" in text
    assert other.num_keys() == before


def test_ranks_that_do_not_come_are_named_with_their_nodes_on_all_that_did(here):
    texts = gather([seat(0), seat(1)])
    missing = r"after \d s 1 of 3 ranks are missing: 2; nodes: nodeb \(0 of 1 came\): see what their logs end with"
    for rank, text in enumerate(texts):
        assert re.search(f"RuntimeError: rank {rank} on nodea is here, but {missing}", text)


def test_a_rank_zero_that_does_not_come_is_said_with_the_address(here):
    (text,) = gather([seat(2)])
    port = master_ports(seat(0).task)[0]
    assert f"RuntimeError: rank 2 on nodeb waited 2 s for rank 0 at 127.0.0.1:{port} (from the step's first" in text
