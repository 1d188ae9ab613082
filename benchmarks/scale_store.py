"""How 1,024 ranks meet: connections to torch's store, and what their failure guards ask of it all the time.

    python -m benchmarks.scale_store

One real server, and the clients of all ranks in this one process, which share its processor time with it.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from benchmarks.scale_report import Result, Tables, run_benchmark, seconds, table
from training.distributed.failure import POLL_S

NAME = "scale_store"
WORLD = 1024
_CONNECTING = 64
"""Threads that connect at once: ranks do not wait for each other."""


def measure(*, small: bool = False) -> Result:
    """Every rank connects twice: to meet the others, and for its failure guard."""
    ranks = 16 if small else WORLD
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 65536), limit))
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def connect(_: int) -> list[Store]:
        met: Store = dist.TCPStore("127.0.0.1", host.port, is_master=False)  # type: ignore[attr-defined]
        return [met, met.clone()]

    start, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(_CONNECTING) as pool:
        stores = [store for pair in pool.map(connect, range(ranks)) for store in pair]
    connected, connected_used = time.perf_counter() - start, time.process_time() - used
    start, used = time.perf_counter(), time.process_time()
    for store in stores:
        store.check(["first"])
    polled, polled_used = time.perf_counter() - start, time.process_time() - used
    return {
        "ranks": ranks,
        "connections": len(stores),
        "connect_s": connected,
        "connect_processor_s": connected_used,
        "requests_per_s": len(stores) / polled,
        "requests_per_processor_s": len(stores) / polled_used,
        "requests_per_s_of_the_guards": ranks / POLL_S,
    }


def tables(result: Result) -> Tables:
    """Markdown by name."""
    rows = [
        [f"{result['connections']:,} connections of {result['ranks']:,} ranks", seconds(result["connect_processor_s"])],
        ["on the clock of the overcommitted machine", seconds(result["connect_s"])],
        ["requests answered in a second of server and clients", f"{result['requests_per_processor_s']:,.0f}"],
        ["requests of all failure guards in a second", f"{result['requests_per_s_of_the_guards']:,.0f}"],
    ]
    return {"store": table(["the store", "processor time"], rows)}


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
