"""Who is there is found out without a collective, and never by waiting longer than asked."""

from __future__ import annotations

import socket
import time

import pytest

from tests.distributed.launch import free_port
from training.distributed.roll_call import RollCall


def join(*ports: int, rank: int = 0, identity: str = "job 1", timeout_s: float = 2.0) -> RollCall:
    return RollCall("127.0.0.1", ports, identity=identity, rank=rank, world_size=3, timeout_s=timeout_s)


def test_notes_of_those_who_leave_them_are_collected_in_time():
    port = free_port()
    first, second = join(port), join(port, rank=1)
    second.note("arrival/1", "here")
    first.note("arrival/0", "me too")
    start = time.monotonic()
    assert first.collect("arrival", range(3), timeout_s=0.3) == {0: "me too", 1: "here"}
    assert time.monotonic() - start < 2
    assert second.read("nobody writes this", timeout_s=0.2) is None
    assert second.meet("phase", size=2, timeout_s=0.2) is False
    assert first.meet("phase", size=2, timeout_s=0.2) is True


def test_where_a_port_is_taken_all_meet_at_the_next():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        taken, port = other.getsockname()[1], free_port()
        first = join(taken, port)
        join(taken, port, rank=1, timeout_s=20).note("x", "y")
        assert first.read("x", timeout_s=1) == "y"
        with pytest.raises(
            RuntimeError, match=f"rank 0 cannot listen at 127.0.0.1, port {taken} .*another MASTER_PORT"
        ):
            join(taken)


def test_the_store_of_another_job_is_not_taken_for_ours():
    port = free_port()
    first = join(port)
    with pytest.raises(RuntimeError, match="another job answers"):
        join(port, rank=1, identity="job 2")
    assert first.world_size == 3


def test_a_rank_0_that_does_not_find_itself_says_so_in_seconds():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 0 cannot listen at no-such-host.invalid.*--slurm-host-suffix"):
        RollCall("no-such-host.invalid", [free_port()], identity="", rank=0, world_size=3, timeout_s=1.0)
    assert time.monotonic() - start < 30


def test_a_rank_0_that_is_not_there_is_said_within_the_time():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 cannot be reached at 127.0.0.1, port .* within 1 s"):
        join(free_port(), rank=2, timeout_s=1.0)
    assert time.monotonic() - start < 8
