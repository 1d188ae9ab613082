"""Lets one thing after another happen to runs, and shows that each still ends as one to which nothing happened.

    python -m tests.faults.soak --minutes 20 --seed 1

A run of two ranks is started; something happens to it: a rank is killed, stopped, or told to end, its newest checkpoint
is damaged, its disk is full, its storage fails. It is started again by the same line, with the next fault, until it is
complete. Samples, losses and weights must then be those of an undisturbed run, bit for bit. With a new seed it begins
again, until the time is over.

Same seed, same plan: what happens, to whom, at which step. How far a killed process has got in between is the machine's
business. Exit code 1 at any difference; the run directory is kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.damage import DAMAGES
from tests.faults.lab import (
    SHARDS,
    Ended,
    Job,
    Lab,
    Nursery,
    Record,
    compare,
    events,
    prepare_data,
    shared_memory_of,
)
from tests.faults.nursery_client import open_nursery
from tests.faults.plan import Fault
from tests.s3.client import Bucket, ObjectServer
from tests.s3.server import Fault as StorageFault
from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import DamagedCheckpoint, verify

STEPS = 36
COMMON = (
    *("--epochs", "3", "--keep-checkpoints", "3", "--save-every-n-steps", "2"),
    *("--timeout-step", "4", "--timeout-heartbeat", "3"),
)
_WITH_WORKERS = ("--workers", "1", "--timeout-step", "20")
"""A worker that is replaced imports torch again: seconds, on a busy machine."""
VARIANTS = {
    "plain": (),
    "accumulated": ("--accum-freq", "2", "--epochs", "6"),
    "workers": _WITH_WORKERS,
    "storage": (*_WITH_WORKERS, "--train-num-samples", "96"),
}
FAULTS_PER_RUN = 6
START_S = 90.0
"""How long one start may take at most, whatever happens to it."""
KILLED = -signal.SIGKILL
_ORDERLY = (0,)
_HUNG = 95


class Trouble(AssertionError):
    """What must not happen."""


class Happening(NamedTuple):
    """One start of a run, and what goes wrong with it."""

    kind: str
    rank: int
    step: int
    """After the one that the start begins with."""
    choice: float
    """Of the kind's own possibilities."""


class Verdict(NamedTuple):
    """What a start may end with."""

    allowed: Callable[[Sequence[int]], bool]
    text: str


ENDS_BY_ITSELF = Verdict(lambda codes: set(codes) == {0}, "all 0")
FALLS_TOGETHER = Verdict(
    lambda codes: set(codes) == {0} or 0 not in codes, "all 0 if it was too late for the fault, or none"
)


class Soak:
    """Runs of one seed, one after another."""

    def __init__(self, root: Path, nursery: Nursery, server: ObjectServer, *, seed: int) -> None:
        self._root = root
        self._seed = seed
        self._data = prepare_data(root / "data")
        self._bucket = Bucket(server, "soak")
        self._bucket.upload_directory(self._data / "shards")
        self._lab = Lab(root, nursery, data=self._data)
        self._records: dict[str, Record] = {}
        self._began = time.monotonic()
        self.happened: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.starts = 0
        self.restart_s: list[float] = []
        """From a kill to the end of the first step after it."""
        self._killed_at: float | None = None

    def run_once(self, number: int) -> None:
        """One run from its beginning to its comparison."""
        draw = random.Random(f"{self._seed}/{number}")
        variant = draw.choice(list(VARIANTS))
        expected = self._undisturbed(variant)
        name = f"run-{number}"
        for _ in range(FAULTS_PER_RUN):
            happening = Happening(draw.choice(KINDS[variant]), draw.randrange(2), draw.randrange(1, 9), draw.random())
            if self._start(name, variant, happening):
                break
        else:
            self._start(name, variant, None)
        self._compare(name, variant, expected)
        shutil.rmtree(self._lab.run_directory(name))

    def _undisturbed(self, variant: str) -> Record:
        if variant not in self._records:
            name = f"undisturbed-{variant}"
            ended = self._lab.run(
                name, *self._flags(variant), environment=self._bucket.environment(), timeout_s=START_S
            )
            self._check(ended, ENDS_BY_ITSELF, name)
            self._records[variant] = self._lab.record(name)
            self._say(
                f"undisturbed, {variant}: {len(self._records[variant].losses)} steps, "
                f"weights {self._records[variant].weights[:16]}"
            )
        return self._records[variant]

    def _flags(self, variant: str) -> list[str]:
        flags = [*COMMON, *VARIANTS[variant]]
        if variant == "storage":
            flags += ["--train-data", f"pipe:aws s3 cp s3://soak/{{000..{SHARDS - 1:03d}}}.tar -"]
        return flags

    def _start(self, name: str, variant: str, happening: Happening | None) -> bool:
        """One start; returns whether the run is complete."""
        whole = self._whole(name)
        first = whole[-1] if whole else 0
        kind = "nothing" if happening is None else happening.kind
        with self._storage_faults(happening):
            reached = self._root / "reached"
            moved = self._root / "moved"
            for mark in (reached, moved):
                mark.unlink(missing_ok=True)
            plan = [Fault("step", "touch", rank=0, call=1, with_={"path": str(moved)})]
            act: Callable[[Job], None] | None = None
            verdict, note = ENDS_BY_ITSELF, ""
            if happening is not None:
                step = first + happening.step
                plan.append(Fault("step", "touch", rank=0, step=step, with_={"path": str(reached)}))
                more, act, verdict, note = _PREPARE[kind](self, name, happening, step)
                plan += more
            job = self._lab.start(name, *self._flags(variant), plan=plan, environment=self._bucket.environment())
            self.starts += 1
            if act is not None:
                self._wait_for_mark(job, reached)
                time.sleep(happening.choice * 0.2 if happening else 0)
                act(job)
            ended = job.wait(timeout_s=START_S)
        self._check(ended, verdict, name)
        self._check_left(job)
        if moved.exists() and self._killed_at is not None:
            self.restart_s.append(moved.stat().st_mtime - self._killed_at)
        self._killed_at = time.time() if KILLED in ended.codes else None
        self.happened[kind] += 1
        after = self._whole(name)
        complete = bool(after) and after[-1] == len(self._records[variant].losses) and set(ended.codes) == {0}
        self._say(f"{name} ({variant}) from step {first}: {kind}{note} -> codes {ended.codes}, saved {after}")
        return complete

    def _wait_for_mark(self, job: Job, mark: Path) -> None:
        while not mark.exists() and len(job.running()) == len(job.pids):
            time.sleep(0.005)

    def _whole(self, name: str) -> list[int]:
        """Steps whose checkpoint verifies."""
        checkpointer, found = Checkpointer(self._lab.run_directory(name) / "checkpoints"), []
        for step in checkpointer.steps():
            with contextlib.suppress(DamagedCheckpoint):
                verify(checkpointer.path(step))
                found.append(step)
        return found

    @contextlib.contextmanager
    def _storage_faults(self, happening: Happening | None) -> Iterator[None]:
        """What the storage does wrong in the meantime; it passes by itself."""
        if happening is None or happening.kind != "storage fails":
            yield
            return
        kinds = (
            StorageFault(times=2, status=503, code="SlowDown"),
            StorageFault(times=2, status=500),
            StorageFault(times=2, reset_at=1500),
            StorageFault(times=2, short_at=1500),
        )
        shards = [f"{shard:03d}.tar" for shard in range(SHARDS)]
        for shard in shards:
            self._bucket.faults(shard, kinds[int(happening.choice * len(kinds))])
        try:
            yield
        finally:
            for shard in shards:
                self._bucket.faults(shard)

    def _check(self, ended: Ended, verdict: Verdict, name: str) -> None:
        # A kill that meets a rank on its way out, once all is done and said, leaves the others with 0.
        done = f"Finished {name}:" in ended.text and set(ended.codes) <= {0, -signal.SIGKILL}
        if not done and not verdict.allowed(ended.codes):
            raise Trouble(f"{name} ended with codes {ended.codes}, expected: {verdict.text}\n{ended.text[-6000:]}")

    def _check_left(self, job: Job) -> None:
        if orphans := job.orphans():
            raise Trouble(f"processes are left: {orphans}")
        if memory := shared_memory_of(job.pids):
            raise Trouble(f"shared memory is left: {memory}")

    def _compare(self, name: str, variant: str, expected: Record) -> None:
        compare(expected, self._lab.record(name))
        if left := self._lab.leftovers(name):
            raise Trouble(f"files are left: {left}")
        self.completed[variant] += 1
        skipped = len(events(self._lab.run_directory(name), "skipped"))
        if skipped:
            raise Trouble(f"{skipped} steps were skipped, none of which was bad")
        self._say(
            f"{name} ({variant}) complete: samples, losses and weights {expected.weights[:16]} are those of the "
            "undisturbed run"
        )

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:7.1f} s] {text}", flush=True)

    # What a kind of fault needs: (faults of the plan, what is done from outside, how it may end, a note).

    def _only_kill(self, name: str, happening: Happening, step: int) -> _Prepared:
        return [Fault("step", "kill", step=step + 6)], None, FALLS_TOGETHER, ", then kill"

    def _kill_one(self, name: str, happening: Happening, step: int) -> _Prepared:
        def act(job: Job) -> None:
            job.send(happening.rank, signal.SIGKILL)

        return [], act, FALLS_TOGETHER, f" {happening.rank} after step {step}"

    def _kill_all(self, name: str, happening: Happening, step: int) -> _Prepared:
        return [], Job.kill, FALLS_TOGETHER, f" after step {step}"

    def _stop_one(self, name: str, happening: Happening, step: int) -> _Prepared:
        def act(job: Job) -> None:
            job.send(happening.rank, signal.SIGSTOP)

        def allowed(codes: Sequence[int]) -> bool:
            return set(codes) == {0} or codes[1 - happening.rank] == _HUNG

        return [], act, Verdict(allowed, "95 of the other rank"), f" {happening.rank} after step {step}"

    def _hold_one(self, name: str, happening: Happening, step: int) -> _Prepared:
        def allowed(codes: Sequence[int]) -> bool:
            return set(codes) == {0} or codes[1 - happening.rank] == _HUNG

        hold = Fault("step", "hold_interpreter", rank=happening.rank, step=step, with_={"seconds": 60})
        return [hold], None, Verdict(allowed, "95 of the other rank"), f" {happening.rank} at step {step}"

    def _signal_one(self, name: str, happening: Happening, step: int) -> _Prepared:
        number = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)[int(happening.choice * 4)]

        def act(job: Job) -> None:
            job.send(happening.rank, number)
            if happening.choice > 0.5:
                job.send(1 - happening.rank, signal.SIGTERM)

        return [], act, ENDS_BY_ITSELF, f" {number.name} to {happening.rank} after step {step}"

    def _kill_in_save(self, name: str, happening: Happening, step: int) -> _Prepared:
        points = (
            "capture",
            "write_file",
            "write_receipt",
            "write_manifest",
            "read_back",
            "rename",
            "hint",
            "retention",
        )
        point = points[int(happening.choice * len(points))]
        rank = happening.rank if point == "capture" else 0
        return [Fault(point, "kill", rank=rank, call=happening.step // 3)], None, FALLS_TOGETHER, f": {point}"

    def _kill_in_load(self, name: str, happening: Happening, step: int) -> _Prepared:
        point = ("candidates", "plan", "open_file", "load")[int(happening.choice * 4)]
        rank = 0 if point in ("candidates", "plan") else happening.rank
        later = Fault("step", "kill", step=step + 3)  # where there is nothing to load yet
        return [Fault(point, "kill", rank=rank, call=0), later], None, FALLS_TOGETHER, f": {point}"

    def _damage(self, name: str, happening: Happening, step: int) -> _Prepared:
        """Before the start; there must be something to fall back to."""
        whole = self._whole(name)
        names = list(DAMAGES)
        damage = names[int(happening.choice * len(names))]
        if len(whole) < 2:
            return [], None, ENDS_BY_ITSELF, ": too few checkpoints"
        DAMAGES[damage](self._lab.checkpoint(name, whole[-1]))
        return [Fault("step", "kill", step=whole[-2] + happening.step)], None, FALLS_TOGETHER, f": {damage}, then kill"

    def _damage_hints(self, name: str, happening: Happening, step: int) -> _Prepared:
        checkpoints = self._lab.run_directory(name) / "checkpoints"
        for file in ("LATEST", "TAGS.json"):
            if (checkpoints / file).exists():
                (checkpoints / file).write_text(("", "step_99999999\n", "\0\0\0\0", "{")[int(happening.choice * 4)])
        return [Fault("step", "kill", step=step)], None, FALLS_TOGETHER, ", then kill"

    def _fill_disk(self, name: str, happening: Happening, step: int) -> _Prepared:
        full = Fault("write_share", "limit_file_size", call=happening.step // 3, with_={"size": 1 << 20})
        return (
            [full, Fault("step", "kill", step=step + 6)],
            None,
            FALLS_TOGETHER,
            f" in save {happening.step // 3}, then kill",
        )

    def _kill_worker(self, name: str, happening: Happening, step: int) -> _Prepared:
        worker = Fault("step", "kill_workers", rank=happening.rank, step=step)
        later = Fault("step", "kill", step=step + 6)
        return [worker, later], None, FALLS_TOGETHER, f" of {happening.rank}, then kill"

    def _second_job(self, name: str, happening: Happening, step: int) -> _Prepared:
        def act(job: Job) -> None:
            if job.running() != [0, 1]:
                return
            for rank in (0, 1):
                job.send(rank, signal.SIGSTOP)
            second = self._lab.run(name, *COMMON, environment=self._bucket.environment(), timeout_s=START_S)
            job.kill()
            if second.codes != [2, 2]:
                raise Trouble(f"a second job was not refused: {second.codes} {second.text[-3000:]}")

        return [], act, FALLS_TOGETHER, f" after step {step}, and kill the first"

    def _shift_clock(self, name: str, happening: Happening, step: int) -> _Prepared:
        jump = Fault("step", "shift_clock", step=step, with_={"seconds": (happening.choice - 0.5) * 1e8})
        for path in self._lab.run_directory(name).rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (happening.choice * 2e9, happening.choice * 2e9))
        return [jump, Fault("step", "kill", step=step + 3)], None, FALLS_TOGETHER, ", then kill"


_Prepared = tuple[list[Fault], Callable[[Job], None] | None, Verdict, str]
_PREPARE: dict[str, Callable[[Soak, str, Happening, int], _Prepared]] = {
    "kill rank": Soak._kill_one,
    "kill all": Soak._kill_all,
    "stop rank": Soak._stop_one,
    "hold the interpreter of rank": Soak._hold_one,
    "signal": Soak._signal_one,
    "kill in a save": Soak._kill_in_save,
    "kill in a load": Soak._kill_in_load,
    "damage the newest checkpoint": Soak._damage,
    "damage LATEST and TAGS": Soak._damage_hints,
    "full disk": Soak._fill_disk,
    "kill worker": Soak._kill_worker,
    "second job": Soak._second_job,
    "clock and times": Soak._shift_clock,
    "storage fails": Soak._only_kill,
}
_ANYWHERE = [kind for kind in _PREPARE if kind not in ("kill worker", "storage fails")]
KINDS = {
    "plain": _ANYWHERE,
    "accumulated": _ANYWHERE,
    "workers": [*_ANYWHERE, "kill worker", "kill worker"],
    "storage": [*_ANYWHERE, "kill worker", *["storage fails"] * 4],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until the time is over; exit code 1 if one run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-run", type=int, default=0, help="of the seed: to see one run again")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    server = ObjectServer()
    shm = _shared_memory()
    failed = ""
    try:
        with open_nursery() as nursery:
            soak = Soak(root, nursery, server, seed=arguments.seed)
            number = arguments.first_run
            while not sum(soak.completed.values()) or time.monotonic() - began < arguments.minutes * 60:
                soak.run_once(number)
                number += 1
            soak._lab.close()
            if grown := _shared_memory() - shm:
                print(f"note: new names in /dev/shm, perhaps of others: {sorted(grown)}")
    except (Trouble, AssertionError, TimeoutError) as error:
        failed = f"{type(error).__name__}: {error}"
    finally:
        server.close()
    _summarize(soak, seconds=time.monotonic() - began, seed=arguments.seed)
    if failed:
        print(f"FAILED in run {number} of seed {arguments.seed}, kept in {root}: {failed}")
        return 1
    shutil.rmtree(root, ignore_errors=True)
    print("every run ended with the samples, losses and weights of an undisturbed one")
    return 0


def _summarize(soak: Soak, *, seconds: float, seed: int) -> None:
    print(f"\nseed {seed}: {soak.starts} starts in {seconds / 60:.1f} minutes")
    for kind, count in sorted(soak.happened.items()):
        print(f"  {count:5d}  {kind}")
    print(f"runs completed: {sum(soak.completed.values())} {dict(soak.completed)}")
    for variant, record in soak._records.items():
        print(f"  {variant:12s} {len(record.losses):4d} steps, sha256 of the weights {record.weights}")
    if soak.restart_s:
        ordered = sorted(soak.restart_s)
        print(
            f"from a kill to the end of the first step after it (without imports): median "
            f"{ordered[len(ordered) // 2]:.1f} s, longest {ordered[-1]:.1f} s, of {len(ordered)}"
        )


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


if __name__ == "__main__":
    sys.exit(main())
