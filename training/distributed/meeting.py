"""Where the processes of a job meet: who says so, and whether it can be right.

A wrong address that is only waited for costs ten minutes of a thousand GPUs. What a process can see at once is looked
at here: a name that its node does not know, a loopback address among several nodes, a host that rank 0 is not on.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlparse

from slurm.environment import Task, host_suffix, master_address, master_ports

_RESOLVE_TRIES, _RESOLVE_PAUSE_S = 4, 1.5
"""A name server that a thousand processes ask in one second may drop some of them."""
_HOW_TO_START = (
    "start with torchrun or srun; or export MASTER_ADDR (rank 0's host) and MASTER_PORT (any free port, e.g. 29500), "
    "or pass --dist-url tcp://HOST:PORT"
)


class Seat(NamedTuple):
    """Who is looking for the others."""

    rank: int
    world_size: int
    task: Task | None
    """What srun says; None if it has not started this process."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def host(self) -> str:
        """SLURM's name of the node where it has one."""
        return self.task.node if self.task is not None else socket.gethostname()


class Meeting(NamedTuple):
    """Where rank 0 listens."""

    host: str
    ports: tuple[int, ...]
    """In the order to try."""
    source: str
    """For messages: who says so."""
    identity: str


def choose_meeting(url: str, environment: Mapping[str, str], seat: Seat, *, suffix: str) -> Meeting:
    """From the address given, or else from SLURM's variables. Pure.

    Raises:
        ValueError: no address, or none that can be used.
    """
    if url.startswith("tcp://"):
        address = urlparse(url)
        if not address.hostname or not address.port:
            raise ValueError(f"--dist-url {url}: give host and port, as in tcp://node1:29500")
        return Meeting(address.hostname, (address.port,), f"--dist-url {url}", _identity(seat, address.port))
    given = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing and seat.task is None:
        raise ValueError(
            f"{seat.world_size} processes but {' and '.join(missing)} not set, so they cannot find each other: "
            f"{_HOW_TO_START}"
        )
    source = " ".join(f"{name}={value}" for name, value in given.items())
    ports: tuple[int, ...] = (_port(given["MASTER_PORT"]),) if "MASTER_PORT" in given else ()
    host = given.get("MASTER_ADDR", "")
    if seat.task is not None and missing:
        ports = ports or master_ports(seat.task)
        if not host:
            suffix = host_suffix(suffix, environment)
            host = master_address(seat.task, suffix=suffix)
            source += f" the step's first node {seat.task.nodes[0]}" + (
                f" with the suffix {suffix!r}" if suffix else ""
            )
    return Meeting(host, ports, source.strip(), _identity(seat, ports[0]))


def _identity(seat: Seat, port: int) -> str:
    """What the store is signed with. Outside of SLURM nothing tells two jobs at one address apart but their size."""
    return seat.task.identity if seat.task is not None else f"{seat.world_size} processes at port {port}"


def _port(text: str) -> int:
    if not text.strip().isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"MASTER_PORT={text!r} is not a port (1 to 65535): {_HOW_TO_START}")
    return int(text)


def check_address(meeting: Meeting, seat: Seat) -> None:
    """Looks the address up.

    Raises:
        ValueError: it cannot be the one of rank 0.
        RuntimeError: this node does not know the name.
    """
    addresses = _resolve(meeting, seat)
    task = seat.task
    if task is None:
        return
    if len(task.nodes) > 1 and _is_loopback(meeting.host):
        raise ValueError(
            f"{meeting.source} is every node itself, but the ranks run on {len(task.nodes)} nodes: unset MASTER_ADDR, "
            f"so that the step's first node is taken, or export a name of rank 0's node"
        )
    if seat.rank == 0 and not any(_is_own(address) for address in addresses):
        raise ValueError(
            f"rank 0 runs on {seat.host}, but {meeting.source} leads to {meeting.host} ({addresses[0]}), which is "
            f"another machine: export MASTER_ADDR={task.node}, or unset it if ranks go to nodes in SLURM's order "
            "(not with --distribution=arbitrary)"
        )


def _resolve(meeting: Meeting, seat: Seat) -> list[str]:
    for attempt in range(1, _RESOLVE_TRIES + 1):
        try:
            found = socket.getaddrinfo(meeting.host, meeting.ports[0], type=socket.SOCK_STREAM)
            return [str(entry[4][0]) for entry in found]
        except (OSError, UnicodeError) as error:
            if attempt == _RESOLVE_TRIES:
                raise RuntimeError(
                    f"{seat.name} cannot resolve {meeting.host!r} ({error}), from {meeting.source}: export MASTER_ADDR "
                    "as this node can reach it (a name or an address of rank 0's node)"
                    + (
                        "; if nodes have a second name for their network, give --slurm-host-suffix, and '' for none"
                        if seat.task is not None
                        else ""
                    )
                ) from error
        time.sleep(_RESOLVE_PAUSE_S)
    raise AssertionError("not reached")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")


def _is_own(address: str) -> bool:
    """Whether this machine has the address: only then a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
