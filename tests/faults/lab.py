"""Starts small jobs of real processes, lets faults happen to them, and looks at what they leave behind.

lab.start(line, plan) -> Job -> Ended      lab.record(run) -> Record: samples, losses, weights
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.factories import write_shards
from tests.faults.nursery_client import Nursery
from tests.faults.plan import MARK_VARIABLE, PLAN_VARIABLE, Fault, encode
from training.checkpoint.checkpointer import Checkpointer, read_step_checkpoint
from training.data.trace import read_trace

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8},
    # The vocabulary is the tokenizer's; narrow, it leaves a checkpoint of 5 MB.
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
SHARDS, SAMPLES = 4, 24
STEPS = 12
"""Of one epoch on two ranks."""
FLAGS = (
    "--device cpu --precision fp32 --batch-size 4 --workers 0 --epochs 1 --warmup 2 --lr 1e-3 --local-loss "
    "--gather-with-grad --force-patch-dropout 0.5 --aug-cfg scale=(0.4,1.0) --log-every-n-steps 1 "
    "--log-metric-every-n-steps 1 --save-every-n-steps 3 --save-frequency 0 --resume latest --trace-samples "
    "--timeout-heartbeat 0"
)
_POLL_S = 0.01


class Disagreement(AssertionError):
    """A run is not what an undisturbed one is."""


class Outcome(NamedTuple):
    """How one rank ended; the code is that of ``subprocess``: negative for a signal."""

    code: int
    text: str


class Ended(NamedTuple):
    """How a job ended."""

    ranks: Sequence[Outcome]
    seconds: float
    """From its start to the end of its last rank."""
    spread_s: float
    """From the end of its first rank to that of its last one."""

    @property
    def codes(self) -> list[int]:
        return [outcome.code for outcome in self.ranks]

    @property
    def text(self) -> str:
        return "".join(outcome.text for outcome in self.ranks)


class Record(NamedTuple):
    """What a run did: equal records are equal runs."""

    samples: Mapping[int, list[tuple[int, int, int]]]
    """By rank: (step, slot, raw index)."""
    losses: Mapping[int, float]
    """By step, as logged."""
    weights: str
    """sha256 of the newest checkpoint's."""


class Job:
    """The ranks of one start of a run."""

    def __init__(
        self,
        nursery: Nursery,
        argv: Sequence[str],
        *,
        world_size: int,
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._nursery = nursery
        self.mark = secrets.token_hex(8)
        self.started = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        self.logs = [directory / f"{self.mark}-{rank}.log" for rank in range(world_size)]
        port = str(_free_port())
        self.pids = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, MARK_VARIABLE: self.mark}
            self.pids.append(nursery.start(argv, environment={**environment, **place, **meeting}, log=self.logs[rank]))

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to one rank, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self._nursery.poll(self.pids[rank]) is None:
                os.kill(self.pids[rank], number)

    def text(self, rank: int) -> str:
        """What a rank has written so far."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, pid in enumerate(self.pids) if self._nursery.poll(pid) is None]

    def wait(self, *, timeout_s: float = 60) -> Ended:
        """Until all ranks have ended.

        Raises:
            TimeoutError: some have not; they are killed.
        """
        end, first_end = time.monotonic() + timeout_s, None
        while left := self.running():
            if first_end is None and len(left) < len(self.pids):
                first_end = time.monotonic()
            if time.monotonic() > end:
                self.kill()
                texts = "".join(self.text(rank)[-3000:] for rank in range(len(self.pids)))
                raise TimeoutError(f"ranks {left} did not end within {timeout_s:.0f} s: {texts}")
            time.sleep(_POLL_S)
        now = time.monotonic()
        codes = [self._nursery.poll(pid) for pid in self.pids]
        outcomes = [Outcome(code or 0, self.text(rank)) for rank, code in enumerate(codes)]
        return Ended(outcomes, now - self.started, now - (first_end or now))

    def kill(self) -> None:
        """All ranks at once, stopped ones too."""
        for rank in self.running():
            self.send(rank, signal.SIGKILL)
        while self.running():
            time.sleep(_POLL_S)

    def orphans(self, *, within_s: float = 30.0) -> list[str]:
        """Command lines of what the job has started and left running; they get a moment to see that it is gone."""
        end = time.monotonic() + within_s
        while found := marked_processes(self.mark):
            if time.monotonic() > end:
                return [f"{pid}: {command}" for pid, command in found.items()]
            time.sleep(0.05)
        return []


class Lab:
    """Runs of one test or of one soak: data, model, logs and processes."""

    def __init__(self, root: Path, nursery: Nursery, *, data: Path, flags: str = FLAGS) -> None:
        self.root = root
        self.logs = root / "logs"
        self._nursery = nursery
        self._jobs: list[Job] = []
        pattern = f"{data}/shards/{{000..{SHARDS - 1:03d}}}.tar"
        self._line = [*flags.split(), "--train-data", pattern, "--model", f"{data}/tiny.json", "--logs", str(self.logs)]

    def line(self, name: str, *more: str) -> list[str]:
        """The command line of a run."""
        return [*self._line, "--name", name, *more]

    def run_directory(self, name: str) -> Path:
        return self.logs / name

    def start(
        self,
        name: str,
        *more: str,
        plan: Sequence[Fault] = (),
        world_size: int = 2,
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Starts, or goes on with, a run."""
        job = Job(
            self._nursery,
            self.line(name, *more),
            world_size=world_size,
            directory=self.root / "output",
            environment={**os.environ, PLAN_VARIABLE: encode(plan), **(environment or {})},
        )
        self._jobs.append(job)
        return job

    def run(self, name: str, *more: str, timeout_s: float = 60, **options: Any) -> Ended:
        """Starts a run and waits for its end."""
        return self.start(name, *more, **options).wait(timeout_s=timeout_s)

    def finish(self, name: str, *more: str, **options: Any) -> Ended:
        """The same for a start that must succeed."""
        ended = self.run(name, *more, **options)
        assert set(ended.codes) == {0}, ended.text[-6000:]
        assert not self.leftovers(name)
        return ended

    def leftovers(self, name: str) -> list[Path]:
        """Unfinished files of a run."""
        return [path for path in self.run_directory(name).rglob("*") if path.name.startswith((".tmp-", ".claim-"))]

    def steps(self, name: str) -> list[int]:
        """Steps with a checkpoint."""
        return Checkpointer(self.run_directory(name) / "checkpoints").steps()

    def saved(self, name: str, *steps: int) -> list[Fault]:
        """Waits at the step after each of these until its checkpoint is there: saves run beside the training."""
        return [
            Fault("step", "wait_for", step=step + 1, with_={"path": str(self.checkpoint(name, step))}) for step in steps
        ]

    def wait_for_step(self, name: str, step: int, *, timeout_s: float = 30) -> None:
        """Until the checkpoint of ``step`` is there."""
        self.wait_for(lambda: step in self.steps(name), timeout_s=timeout_s, what=f"the checkpoint of step {step}")

    def wait_for(self, condition: Callable[[], object], *, what: str, timeout_s: float = 30) -> None:
        """Until a condition holds; says what the ranks have said if it never does."""
        try:
            wait_until(condition, timeout_s=timeout_s, what=what)
        except TimeoutError as error:
            said = "".join(self._jobs[-1].text(rank)[-3000:] for rank in range(len(self._jobs[-1].pids)))
            raise TimeoutError(f"{error}: {said}") from None

    def checkpoint(self, name: str, step: int) -> Path:
        """The directory of a step."""
        return Checkpointer(self.run_directory(name) / "checkpoints").path(step)

    def record(self, name: str) -> Record:
        """What a run did."""
        return read_record(self.run_directory(name))

    def last_start(self, name: str) -> dict[str, Any]:
        """What is on record of the newest start of a run."""
        return starts(self.run_directory(name))[-1]

    def first_step(self, name: str) -> int:
        """The step that the newest start of a run began with."""
        return int(self.last_start(name)["step"])

    def close(self) -> None:
        """Kills what still runs; nothing that a job has started may be left, nor any of its memory."""
        for job in self._jobs:
            job.kill()
        for job in self._jobs:
            assert not job.orphans(), f"still there: {job.orphans()}"
            assert not shared_memory_of(job.pids)


def prepare_data(directory: Path) -> Path:
    """Shards and model that all runs use."""
    write_shards(directory / "shards", shards=SHARDS, samples=SAMPLES)
    (directory / "tiny.json").write_text(json.dumps(MODEL))
    return directory


def read_record(run: Path) -> Record:
    """What a run did, from what it has written down."""
    traces = read_trace(run / "trace")
    newest = Checkpointer(run / "checkpoints").newest()
    assert newest is not None
    return Record(
        {rank: records.tolist() for rank, records in traces.items()},
        {int(line["step"]): line["train/loss"] for line in json_lines(run / "metrics.jsonl") if "train/loss" in line},
        weights_hash(newest),
    )


def weights_hash(checkpoint: Path) -> str:
    """sha256 of names and values of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_step_checkpoint(checkpoint).model.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def compare(expected: Record, found: Record) -> None:
    """Raises Disagreement where two runs differ."""
    for rank in expected.samples.keys() | found.samples.keys():
        if expected.samples.get(rank) != found.samples.get(rank):
            raise Disagreement(f"the samples of rank {rank} differ")
    if expected.losses != found.losses:
        steps = sorted(step for step, _ in expected.losses.items() ^ found.losses.items())
        raise Disagreement(f"the losses differ, first of step {steps[0]}")
    if expected.weights != found.weights:
        raise Disagreement(f"the weights differ: {expected.weights[:16]} and {found.weights[:16]}")


def marked_processes(mark: str) -> dict[int, str]:
    """Command lines of the processes that a job has started itself, by number."""
    wanted, found = f"{MARK_VARIABLE}={mark}".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes()[:200].replace(b"\0", b" ").decode()
    return found


def starts(run: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order."""
    return json_lines(run / "starts.jsonl")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of one kind, in order."""
    return [line for line in json_lines(run / "events.jsonl") if line["event"] == name]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file."""
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole if line]


def wait_until(condition: Callable[[], object], *, timeout_s: float = 30, what: str = "it") -> None:
    """Returns when the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def shared_memory_of(pids: Sequence[int]) -> list[str]:
    """Names in /dev/shm that carry the number of one of the processes."""
    names = os.listdir("/dev/shm") if Path("/dev/shm").is_dir() else []
    return [name for name in names if any(str(pid) in name.replace("-", "_").split("_") for pid in pids)]


def _free_port() -> int:
    """Not one of the range that connections are given, where a port may be taken again before the ranks meet."""
    for _ in itertools.count():
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError
