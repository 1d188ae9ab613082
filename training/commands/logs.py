"""``clipyard logs RUN``: the last lines of what a run, its batch script or one of its ranks has written.

clipyard logs RUN                  the batch script's log, and rank 0's (out.log)
clipyard logs RUN --follow         the same as it grows, until you stop it
clipyard logs RUN --rank 17        everything that rank 17 printed
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slurm.run_record import check_is_run, script_logs

_POLL_S = 0.5
_TAIL_BYTES_PER_LINE = 2000


def main(argv: Sequence[str]) -> int:
    """Exit code 2 for a directory that is no run, or a log that is not there."""
    parser = argparse.ArgumentParser(prog="clipyard logs", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's directory: --logs joined with --name")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="R", help="what this rank printed")
    which.add_argument("--job", action="store_true", help="the batch script's log only")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as the logs grow")
    parser.add_argument("--lines", "-n", type=int, default=30, metavar="N", help="of each log (%(default)s)")
    arguments = parser.parse_args(argv)
    find = _finder(arguments.run, rank=arguments.rank, job_only=arguments.job)
    try:
        check_is_run(arguments.run)
        if not find() and not arguments.follow:
            raise ValueError(_nothing_there(arguments.run, rank=arguments.rank))
        follower = Follower(find, lines=arguments.lines)
        follower.poll()
        while arguments.follow:
            time.sleep(_POLL_S)
            follower.poll()
    except ValueError as error:
        sys.stderr.write(f"clipyard logs: {error}\n")
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 0
    return 0


class Follower:
    """Prints what is new in some files, with a line that names the file where there are several."""

    def __init__(self, find: Callable[[], Sequence[Path]], *, lines: int) -> None:
        self._find = find
        self._lines = lines
        self._places: dict[Path, tuple[int, int]] = {}
        """{file: (inode, bytes that are printed)}."""
        self._last: Path | None = None

    def poll(self) -> None:
        """Prints what has been added since the last call; at the first the last lines of each file."""
        paths = self._find()
        for path in paths:
            try:
                facts = path.stat()
                known = self._places.get(path)
                begin = known[1] if known is not None and known[0] == facts.st_ino else None
                # A file that is shorter than before was begun anew.
                if begin is not None and facts.st_size < begin:
                    begin = 0
                text, end = self._read(path, begin, size=facts.st_size)
            except OSError:  # gone between the listing and the look
                continue
            self._places[path] = (facts.st_ino, end)
            if text:
                self._show(path, text, several=len(paths) > 1)
        sys.stdout.flush()

    def _read(self, path: Path, begin: int | None, *, size: int) -> tuple[str, int]:
        start = max(0, size - self._lines * _TAIL_BYTES_PER_LINE) if begin is None else begin
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        text = data.decode(errors="replace")
        if begin is None:
            text = "".join(text.splitlines(keepends=True)[-self._lines :]) if self._lines > 0 else ""
        return text, start + len(data)

    def _show(self, path: Path, text: str, *, several: bool) -> None:
        if several and path != self._last:
            sys.stdout.write(f"==> {path} <==\n")
        self._last = path
        sys.stdout.write(text)


def _finder(run: Path, *, rank: int | None, job_only: bool) -> Callable[[], list[Path]]:
    """What to look at now: a job may begin, and with it its log, while somebody follows."""

    def find() -> list[Path]:
        if rank is not None:
            # The second is --log-local's.
            return [path for path in (run / "slurm" / f"rank-{rank:05d}.log", run / f"out-{rank}") if path.exists()][:1]
        jobs = script_logs(run)[-1:]
        outs = [] if job_only else [path for path in (run / "out.log", run / "out-0") if path.exists()][:1]
        return [*jobs, *outs]

    return find


def _nothing_there(run: Path, *, rank: int | None) -> str:
    if rank is None:
        return f"{run} has no log yet: it may wait in the queue (`clipyard status {run}`), or pass --follow."
    ranks = sorted(int(path.stem.removeprefix("rank-")) for path in (run / "slurm").glob("rank-*.log"))
    if not ranks:
        return f"{run} has no logs by rank: jobs of `clipyard submit` write them. Leave --rank out."
    return f"rank {rank} has written nothing: there are logs of ranks {ranks[0]} to {ranks[-1]}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
