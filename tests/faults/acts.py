"""What can go wrong: each act gets the moment that it strikes in, and may change the arguments or the result."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.scaled_loss import ScaledLoss
from training.checkpoint.manifest import DamagedCheckpoint, describe
from training.data.storage_errors import StorageError


class Instead(Exception):
    """Raised by an act: the real function is not called, and returns this."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


@dataclass
class Moment:
    """A call of a point's function."""

    args: list[Any]
    kwargs: dict[str, Any]
    parts: Any
    """The ``RunParts`` of this process; None before there are any."""
    rank: int
    result: Any = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    """Called when the real function has returned."""


def kill(moment: Moment) -> None:
    """As the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_times(moment: Moment, *, path: str, times: int) -> None:
    """The same, in each of the first so many starts; a file counts them."""
    counter = Path(path)
    count = len(counter.read_text()) if counter.exists() else 0
    if count < times:
        counter.write_text("x" * (count + 1))
        kill(moment)


def send(moment: Moment, *, name: str, then_s: float = 0.0) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(then_s)


def sleep(moment: Moment, *, seconds: float) -> None:
    time.sleep(seconds)


def hold_interpreter(moment: Moment, *, seconds: int) -> None:
    """Native code that does not let other threads of Python run."""
    ctypes.PyDLL(None).sleep(seconds)


def leave(moment: Moment, *, code: int) -> None:
    """Without a word, as native code does that calls exit."""
    os._exit(code)


def fail(moment: Moment, *, text: str = "planted") -> None:
    raise RuntimeError(text)


def fail_with_errno(moment: Moment, *, name: str) -> None:
    number = getattr(errno, name)
    raise OSError(number, os.strerror(number))


def no_memory(moment: Moment) -> None:
    raise MemoryError("planted")


def skip(moment: Moment, *, value: Any = None) -> None:
    """The protection is off: the function does nothing."""
    raise Instead(value)


def wait_for(moment: Moment, *, path: str, tell: str = "") -> None:
    """Until somebody makes a file; says first that it waits."""
    if tell:
        Path(tell).touch()
    end = time.monotonic() + 60
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.005)


def touch(moment: Moment, *, path: str) -> None:
    Path(path).touch()


def save_in_place(moment: Moment) -> None:
    """The protection is off: files are written where readers look for a checkpoint; at ``new_staging``."""
    raise Instead(moment.args[0].path(moment.args[1]))


def follow_hint(moment: Moment) -> None:
    """The protection is off: LATEST is believed; at ``candidates``."""
    root = moment.args[0].root
    raise Instead([root / (root / "LATEST").read_text().strip()])


def newest_only(moment: Moment, *, step: int) -> None:
    """The protection is off: there is no other checkpoint to fall back to; at ``candidates``."""
    raise Instead([moment.args[0].path(step)])


def trust_what_is_there(moment: Moment, *, after: str) -> None:
    """The protection is off: the files that are there are those of the checkpoint; at ``receipts``.

    Args:
        after: a file of another writer that is waited for until it no longer grows.
    """
    wait_for(moment, path=str(moment.args[1] / after))
    size = -1
    while size != (size := (moment.args[1] / after).stat().st_size):
        time.sleep(0.5)
    files = [path for path in moment.args[1].iterdir() if not path.name.startswith(".")]
    raise Instead({path.name: describe(path) for path in files})


def wait_for_writer(moment: Moment) -> None:
    """The protection is off: training waits for what is being written; at ``background``."""
    moment.args[0].wait()


def damaged(moment: Moment) -> None:
    """What is read is not what was written."""
    raise DamagedCheckpoint("planted damage")


def newest_by_time(moment: Moment) -> None:
    """The protection is off: times of files decide; at ``candidates``."""
    raise Instead(sorted(moment.args[0].root.glob("step_*"), key=lambda path: -path.stat().st_mtime))


def hide(moment: Moment, *, part: str) -> None:
    """Files whose path contains ``part`` are not there for this rank; at ``open_file``."""
    if part in str(moment.args[0]):
        raise DamagedCheckpoint(f"{moment.args[0]} cannot be opened (planted)")


def shift_clock(moment: Moment, *, seconds: float) -> None:
    """What the clock says jumps, as after a correction by NTP; what counts seconds does not."""
    now = time.time
    time.time = lambda: now() + seconds


def unpickle_everything(moment: Moment) -> None:
    """The protection is off; at ``torch_load``."""
    moment.kwargs["weights_only"] = False


def give_up(moment: Moment) -> None:
    """The protection is off: the first failure of the storage is the last; at ``retry``."""
    raise StorageError("planted: no further attempt")


def same_config(moment: Moment) -> None:
    """The protection is off: the settings of now are compared with themselves; at ``compare_config``."""
    moment.args[0] = moment.args[1]


def limit_file_size(moment: Moment, *, size: int) -> None:
    """Until the function has returned no file can grow beyond ``size`` bytes: a full disk, as far as writing goes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    moment.undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


def spoil_image(moment: Moment, *, value: float) -> None:
    """One pixel of this rank's batch; at ``step``."""
    moment.args[1][0].images[0, 0, 0, 0] = value


def scale_loss(moment: Moment, *, factor: float) -> None:
    """The loss of this rank, and with it all gradients; at ``step``."""
    train_step = moment.args[0]
    loss = train_step.loss
    train_step.loss = ScaledLoss(loss, factor)
    moment.undo.append(lambda: setattr(train_step, "loss", loss))


def scale_gradients(moment: Moment, *, factor: float) -> None:
    """Of this rank alone, after the ranks have exchanged them; at ``update``."""
    for parameter in moment.args[0]._parameters:
        parameter.grad.mul_(factor)


def leave_out(moment: Moment) -> None:
    """The batch is read, and nothing is learned from it; at ``update``."""
    optimizer = moment.args[0]._optimizer
    step = optimizer.step
    optimizer.step = lambda: None
    moment.undo.append(lambda: setattr(optimizer, "step", step))


def judge_alone(moment: Moment) -> None:
    """The protection is off: each rank asks only itself; at ``judge``."""
    guard = moment.args[0]
    guard._all_reduce_sum = lambda own: own * guard._world_size


def scale_second_moment(moment: Moment, *, factor: float) -> None:
    """What AdamW knows about the size of the gradients becomes too small; at ``step``."""
    for state in moment.parts.optimizer.state.values():
        state["exp_avg_sq"].mul_(factor)


def flip_bit(moment: Moment, *, bit: int = 12) -> None:
    """One bit of one weight of this rank."""
    weight = next(parameter for parameter in moment.parts.model.parameters() if parameter.ndim == 2)
    weight.data.view(-1).view(torch.int32)[0] ^= 1 << bit


def spoil_weight(moment: Moment) -> None:
    """One weight of this rank is no number any more."""
    next(moment.parts.model.parameters()).data.view(-1)[0] = float("nan")


def kill_workers(moment: Moment, *, which: int = 0) -> None:
    """One of this rank's loader workers."""
    os.kill(_workers()[which], signal.SIGKILL)


def limit_worker_memory(moment: Moment, *, size: int) -> None:
    """Each of this rank's loader workers may take so many bytes more than it has."""
    for pid in _workers():
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + size
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def _workers() -> list[int]:
    """Children of children of this process that lead a session: workers, and not the processes that forked them."""
    hosts = _children(os.getpid())
    return [pid for host in hosts for pid in _children(host) if os.getsid(pid) == pid]


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.name))
    return sorted(found)


ACTS: dict[str, Callable[..., None]] = {
    act.__name__: act
    for act in (
        *(
            kill,
            kill_times,
            send,
            sleep,
            hold_interpreter,
            leave,
            fail,
            fail_with_errno,
            no_memory,
            skip,
            wait_for,
            touch,
        ),
        *(
            limit_file_size,
            spoil_image,
            scale_loss,
            scale_gradients,
            leave_out,
            judge_alone,
            scale_second_moment,
            flip_bit,
            spoil_weight,
        ),
        *(save_in_place, follow_hint, newest_only, trust_what_is_there, wait_for_writer, damaged),
        *(newest_by_time, hide, shift_clock, unpickle_everything, give_up, same_config),
        *(kill_workers, limit_worker_memory),
    )
}
