"""Brings the processes of a job together: a store that all of them reach, and the certainty that all are there.

    where?      --dist-url | MASTER_ADDR, MASTER_PORT | torchrun's agent | the step's first node, a port from its number
    the store   rank 0 listens and signs with the job's identity; the others look for that signature
    roll call   every rank reports with its host's name; rank 0 says to all that everybody is there, or who is not

A port may belong to somebody else: to another job's store, which must not take our ranks for its own, to a process of
this job's last start that is about to end, or to any other program. Whoever it is, both sides say so.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from training.distributed.listeners import who_listens
from training.distributed.meeting import Meeting, Seat, check_address, choose_meeting
from training.distributed.store_calls import answer_within

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long the first process waits for the last one to start: nodes of one job boot and import at different speeds."""
PORT_PATIENCE_S = 20.0
"""How long rank 0 waits for its port: the last start's process may need KillWait to end. The others wait twice that."""
_SIGNATURE = "clipyard/signature"
_PROBE_S = 3.0
_POLL_S, _LONGEST_POLL_S = 0.05, 1.0
_REMIND_S = 60.0
_NAMED = 20
"""Missing ranks or nodes that a message names; the rest are counted."""


def meet(dist_url: str | None, seat: Seat, *, suffix: str, timeout: timedelta = RENDEZVOUS_TIMEOUT) -> Store:
    """A store that all ranks have joined. Collective: all ranks.

    Args:
        suffix: ``--slurm-host-suffix``.
        timeout: for the last rank to come.

    Raises:
        ValueError: an address that cannot be right.
        RuntimeError: a name that this node cannot resolve, a port that somebody else has, ranks that did not come in
            time: the next start may find it otherwise.
    """
    started = time.monotonic()
    url = dist_url or "env://"
    if not url.startswith(("env://", "tcp://", "file://")):
        raise ValueError(f"--dist-url {url}: give env://, tcp://HOST:PORT or file:///PATH")
    if url.startswith("file://") or (url.startswith("env://") and _has_agent_store()):
        # Made by somebody else: the file system, or torchrun's agent.
        store: Store = next(iter(rendezvous(url, seat.rank, seat.world_size, timeout=timeout)))[0]
    else:
        meeting = choose_meeting(url, os.environ, seat, suffix=suffix)
        if not os.environ.get("MASTER_PORT"):
            os.environ.pop("MASTER_PORT", None)  # torch's store takes offence at an empty one
        check_address(meeting, seat)
        store = _listen(meeting, seat, timeout) if seat.rank == 0 else _find(meeting, seat, timeout)
    _call_the_roll(PrefixStore("roll_call", store), seat, timeout=timeout, started=started)
    return store


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen(meeting: Meeting, seat: Seat, timeout: timedelta) -> Store:
    """Rank 0: at the first port that is free."""
    deadline = time.monotonic() + min(PORT_PATIENCE_S, timeout.total_seconds())
    while True:
        for port in meeting.ports:
            try:
                store = TCPStore(meeting.host, port, None, is_master=True, timeout=timeout, wait_for_workers=False)
            except RuntimeError as error:
                if "EADDRINUSE" not in str(error):
                    raise
            else:
                store.set(_SIGNATURE, meeting.identity)
                _publish(meeting.host, port)
                return store
        if time.monotonic() > deadline:
            raise RuntimeError(_taken(meeting, f"{seat.name} cannot listen there", who_listens(meeting.ports[0])))
        time.sleep(_LONGEST_POLL_S)


def _find(meeting: Meeting, seat: Seat, timeout: timedelta) -> Store:
    """Every other rank: where somebody listens who signs with this job's identity."""
    now = time.monotonic()
    deadline, wait_s = now + timeout.total_seconds(), _POLL_S
    stranger, stranger_since = "", now
    while True:
        seen = ""
        for port in meeting.ports:
            signature = _signature(meeting.host, port)
            if signature == meeting.identity:
                _publish(meeting.host, port)
                return TCPStore(meeting.host, port, None, is_master=False, timeout=timeout, wait_for_workers=False)
            seen = signature or seen
        now = time.monotonic()
        if not seen or seen != stranger:
            stranger, stranger_since = seen, now
        # Of several ports rank 0 may just not have come to any yet.
        if stranger and len(meeting.ports) == 1 and now - stranger_since > 2 * PORT_PATIENCE_S:
            raise RuntimeError(_taken(meeting, f"{seat.name} finds no rank 0 there", stranger))
        if now > deadline:
            raise RuntimeError(
                f"{seat.name} waited {timeout.total_seconds():.0f} s for rank 0 at {meeting.host}:{meeting.ports[0]} "
                f"(from {meeting.source}): it did not start (see its log), or this node cannot reach it (a firewall, "
                "another network: export MASTER_ADDR or give --slurm-host-suffix)"
            )
        # At random: a thousand ranks must not knock at the same moment.
        time.sleep(wait_s * random.uniform(0.5, 1.0))
        wait_s = min(2 * wait_s, _LONGEST_POLL_S)


def _signature(host: str, port: int) -> str:
    """Whose store listens there; empty if nobody does, or rank 0 has not signed yet."""
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except OSError:
        return ""
    try:
        return answer_within(2 * _PROBE_S, lambda: _read_signature(host, port))
    except RuntimeError:
        return "a program that does not answer as a rank 0 does"


def _read_signature(host: str, port: int) -> str:
    timeout = timedelta(seconds=_PROBE_S)
    store = TCPStore(host, port, None, is_master=False, timeout=timeout, wait_for_workers=False)
    deadline = time.monotonic() + _PROBE_S
    while time.monotonic() < deadline:
        if store.check([_SIGNATURE]):
            return store.get(_SIGNATURE).decode()
        time.sleep(_POLL_S)
    return "a store of torch.distributed that is not this job's"


def _taken(meeting: Meeting, who: str, holder: str) -> str:
    unset = "unset MASTER_PORT, so that each start takes a port of its own, or " if meeting.source else ""
    return (
        f"port {meeting.ports[0]} of {meeting.host} (from {meeting.source}) is taken: {who}, it belongs to {holder}. "
        f"Under srun {unset}export another one; elsewhere give a free one"
    )


def _publish(host: str, port: int) -> None:
    """Libraries that look at the environment themselves find what torchrun would have set."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))


def _call_the_roll(store: Store, seat: Seat, *, timeout: timedelta, started: float) -> None:
    """Returns when all ranks are there. Collective: all ranks.

    Raises:
        RuntimeError: some are not, on every rank that is.
    """
    store.set(f"host/{seat.rank}", seat.host)
    store.add("arrived", 1)
    left = timedelta(seconds=max(1.0, timeout.total_seconds() - (time.monotonic() - started)))
    if seat.rank == 0:
        verdict = _wait_for_all(store, seat, timeout=left)
        store.set("verdict", verdict)
        if verdict:
            _wait_until_read(store)
    else:
        try:
            # Rank 0 decides; it may have come last.
            store.wait(["verdict"], left + timeout)
            verdict = store.get("verdict").decode()
            store.add("read", 1)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"{seat.name}: rank 0 is gone while the ranks gathered; see its log ({reason})"
            ) from error
    if verdict:
        raise RuntimeError(f"{seat.name} is here, but {verdict}")


def _wait_for_all(store: Store, seat: Seat, *, timeout: timedelta) -> str:
    """Rank 0: what is to be said about those who did not come; empty if all did."""
    start = reminded = time.monotonic()
    wait_s = _POLL_S
    while store.add("arrived", 0) < seat.world_size:
        now = time.monotonic()
        if now - start > timeout.total_seconds():
            return (
                f"after {timeout.total_seconds():.0f} s {_describe_missing(store, seat)}: see what their logs end with"
            )
        if now - reminded > _REMIND_S:
            reminded = now
            logger.warning("Waiting since %.0f s: %s", now - start, _describe_missing(store, seat))
        time.sleep(wait_s)
        wait_s = min(1.5 * wait_s, _LONGEST_POLL_S)
    return ""


def _describe_missing(store: Store, seat: Seat) -> str:
    ranks = range(seat.world_size)
    here = {rank for rank in ranks if store.check([f"host/{rank}"])}
    missing = [rank for rank in ranks if rank not in here]
    text = f"{len(missing)} of {seat.world_size} ranks are missing: {_shorten(missing)}"
    if seat.task is None:
        return text
    # Which rank runs where is srun's --distribution; how many on each node is known.
    arrived = Counter(store.get(f"host/{rank}").decode() for rank in here)
    expected = zip(seat.task.nodes, seat.task.tasks_per_node, strict=True)
    short = [f"{node} ({arrived[node]} of {count} came)" for node, count in expected if arrived[node] < count]
    return f"{text}; nodes: {_shorten(short)}"


def _shorten(items: Sequence[object]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(str(item) for item in items[:_NAMED]) + more


def _wait_until_read(store: Store) -> None:
    """The store ends with rank 0's process."""
    deadline = time.monotonic() + _PROBE_S
    while store.add("read", 0) < store.add("arrived", 0) - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)
