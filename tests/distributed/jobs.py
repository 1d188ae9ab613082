"""Small training jobs that fail on purpose, for real processes: ``python -m tests.distributed.jobs NAME``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from training.config import EngineConfig
from training.distributed.collectives import all_reduce_sum, barrier
from training.distributed.failure import fail_together
from training.distributed.job_end import JobEnd
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime, close_runtime, start_runtime

job_end = JobEnd()


def clean(runtime: Runtime) -> None:
    """Ranks come to the end at different times."""
    all_reduce_sum(torch.ones(1))
    if runtime.rank == 0:
        time.sleep(1.2)


def fails_before_a_collective(runtime: Runtime) -> None:
    if runtime.rank == 1:
        raise ValueError("planted before")
    all_reduce_sum(torch.ones(1))


def fails_on_rank_zero(runtime: Runtime) -> None:
    if runtime.rank == 0:
        raise ValueError("planted on the host of the store")
    all_reduce_sum(torch.ones(1))


def fails_within_a_collective(runtime: Runtime) -> None:
    """In the middle of a backward pass: the healthy rank is inside DDP's all-reduce by then."""
    model = parallelize(torch.nn.Linear(2, 2), config=EngineConfig(device="cpu"), runtime=runtime)
    output = model(torch.ones(1, 2))
    if runtime.rank == 1:
        output.register_hook(_fail_in_backward)
    output.sum().backward()


def _fail_in_backward(gradient: torch.Tensor) -> None:
    raise ValueError("planted within")


def fails_after_a_collective(runtime: Runtime) -> None:
    all_reduce_sum(torch.ones(1))
    if runtime.rank == 1:
        raise ValueError("planted after")
    barrier()


def fails_while_the_other_computes(runtime: Runtime) -> None:
    """The healthy rank is in no collective at all."""
    if runtime.rank == 1:
        raise ValueError("planted beside")
    time.sleep(60)


def leaves_its_group_first(runtime: Runtime) -> None:
    """The peer sees a reset connection at once, well before the failing rank has said anything."""
    if runtime.rank == 1:
        dist.destroy_process_group()
        time.sleep(1.0)
        raise ValueError("planted after closing the connection")
    all_reduce_sum(torch.ones(1))


def is_killed(runtime: Runtime) -> None:
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce_sum(torch.ones(1))


def is_killed_while_the_other_computes(runtime: Runtime) -> None:
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def host_is_killed_while_the_other_computes(runtime: Runtime) -> None:
    if runtime.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def host_is_killed_while_the_other_waits(runtime: Runtime) -> None:
    """The other loses the collective and the store in the same moment."""
    time.sleep(0.7)  # the neighbours have met
    if runtime.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce_sum(torch.ones(1))


def blames_the_other_from_a_thread(runtime: Runtime) -> None:
    """What a watchdog does; the rank to blame is stopped."""
    time.sleep(0.7)
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    job_end.last_act = lambda: print("last act", file=sys.stderr)
    threading.Thread(target=lambda: job_end.fail(1, 95, "planted hang", (1,))).start()
    all_reduce_sum(torch.ones(1))


def ends_alone(runtime: Runtime) -> None:
    """A single process, with a last act that fails."""
    job_end.last_act = lambda: 1 / 0
    threading.Thread(target=lambda: job_end.fail(0, 95, "planted hang")).start()
    time.sleep(60)


def exits_with_a_code(runtime: Runtime) -> None:
    if runtime.rank == 1:
        sys.exit(7)
    barrier()


def exits_with_zero(runtime: Runtime) -> None:
    barrier()
    sys.exit(0)


def is_interrupted(runtime: Runtime) -> None:
    if runtime.rank == 1:
        raise KeyboardInterrupt
    barrier()


def hangs_in_native_code_at_exit(runtime: Runtime) -> None:
    """A rank that fails must end even if something keeps its interpreter from finishing."""
    if runtime.rank == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise ValueError("planted with a thread that stays")
    barrier()


def fails_while_the_other_computes_briefly(runtime: Runtime) -> None:
    if runtime.rank == 1:
        raise ValueError("planted beside")
    time.sleep(3)


def main(name: str, *, guarded: bool = True) -> None:
    global job_end
    # "nonsense" is refused on the rank that gets it, while the others already wait for it in the group.
    device = "nonsense" if f"{name}@{os.environ['RANK']}" == "clean_without_a_device@1" else "cpu"
    runtime = start_runtime(EngineConfig(device=device))
    with fail_together(runtime) if guarded else contextlib.nullcontext(JobEnd()) as job_end:
        globals()[name.removesuffix("_without_a_device")](runtime)
    if guarded:
        close_runtime(runtime)


def main_without_the_guard(name: str) -> None:
    main(name, guarded=False)


def main_at(dist_url: str) -> None:
    """Nothing but --dist-url says where the ranks meet."""
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    runtime = start_runtime(EngineConfig(device="cpu", dist_url=dist_url))
    with fail_together(runtime):
        clean(runtime)
    close_runtime(runtime)


if __name__ == "__main__":
    main(sys.argv[1])
