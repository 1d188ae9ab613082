"""Starts ranks without importing torch for each: a process that has imported everything, and forks.

    stdin:  {"argv", "environment", "log"}   {"poll": pid}     one JSON object per line
    stdout: {"pid"}                          {"code"}          null while it runs

It has no threads and has computed nothing, so what it forks is as good as new. Its standard input is its lifeline.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import training.main  # noqa: F401 - this is what it is for
from models.clip_bpe import load_vocabulary
from tests.faults import victim


def serve() -> list[str] | None:
    """Answers requests; returns the arguments in a process that is to train, None when nobody asks any more."""
    children: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if children[pid] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                children[pid] = os.waitstatus_to_exitcode(status) if done else None
            answer = {"code": children[pid]}
        else:
            pid = os.fork()
            if pid == 0:
                _become_rank(request["environment"], request["log"])
                return list(request["argv"])
            children[pid] = None
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid, code in children.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
    return None


def _become_rank(environment: Mapping[str, str], log: str) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["victim"]


def main() -> Any:
    """The nursery, or one of its children."""
    load_vocabulary()
    gc.collect()
    gc.freeze()  # or a rank would look through all that was imported, and copy its memory
    argv = serve()
    if argv is not None:
        victim.run(argv)
    else:
        os._exit(0)  # without the farewells of the libraries


if __name__ == "__main__":
    main()
