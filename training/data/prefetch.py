"""Brings batches to the device ahead of the step that needs them.

loader (shared memory, pinned) --side stream: copy, normalise--> DeviceBatch --queue of one--> step (main stream)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from training.data.batch import Batch, BatchRecord, DeviceBatch

_POLL_S = 0.2
_MOST_UNDECODABLE = 1000
"""Samples in a row."""


def load_to_device(
    batches: Iterator[Batch], *, to_device: Callable[[Batch], DeviceBatch], device: torch.device
) -> Iterator[DeviceBatch]:
    """The batches on the device, in order; on CUDA one is copied while the step works on the one before.

    A batch of which no image can be decoded shows the samples of the next one, which is shown again in its turn: what
    a run sees depends on the data alone, also after a resume.

    Raises:
        ValueError: there is no next one within a thousand samples.
    """
    if device.type != "cuda":
        return _filled(map(to_device, batches))
    return _prefetch(batches, to_device=to_device, device=device)


def pin(memory: Tensor) -> Callable[[], None]:
    """Makes a tensor's memory page-locked, so that copies to a GPU run beside its computation; returns the undoing.

    Raises:
        RuntimeError: the system allows no more locked memory.
    """
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(status) != 0:
        raise RuntimeError(
            f"{memory.nbytes / 2**20:.0f} MiB of loader memory cannot be page-locked (CUDA error {int(status)}): raise "
            "`ulimit -l`, or lower --batch-size."
        )
    return partial(_unpin, memory)


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _prefetch(
    batches: Iterator[Batch], *, to_device: Callable[[Batch], DeviceBatch], device: torch.device
) -> Iterator[DeviceBatch]:
    ready: queue.Queue[tuple[DeviceBatch, torch.cuda.Event] | BaseException] = queue.Queue(maxsize=1)
    stopped = threading.Event()
    arguments = (batches, to_device, device, ready, stopped)
    thread = threading.Thread(target=_copy_batches, args=arguments, name="device-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            batch, copied = item
            stream = torch.cuda.current_stream(device)
            stream.wait_event(copied)
            for tensor in tensors_of(batch):
                tensor.record_stream(stream)  # made on the side stream: not to be reused before this one is done
            yield batch
    finally:
        stopped.set()
        thread.join()


def _copy_batches(
    batches: Iterator[Batch],
    to_device: Callable[[Batch], DeviceBatch],
    device: torch.device,
    ready: queue.Queue[tuple[DeviceBatch, torch.cuda.Event] | BaseException],
    stopped: threading.Event,
) -> None:
    """The thread. It alone reads the loader; what it hands over is committed by the trainer, batch by batch."""
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for on_device in _filled(_copied(batches, to_device, stream)):
                copied = torch.cuda.Event()
                copied.record(stream)
                if not _put(ready, (on_device, copied), stopped):
                    return
    except BaseException as error:
        _put(ready, error, stopped)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _copied(
    batches: Iterator[Batch], to_device: Callable[[Batch], DeviceBatch], stream: torch.cuda.Stream
) -> Iterator[DeviceBatch]:
    for batch in batches:
        on_device = to_device(batch)
        stream.synchronize()  # by this thread only: the loader may write to the batch's memory from here on
        yield on_device


def _filled(batches: Iterator[DeviceBatch]) -> Iterator[DeviceBatch]:
    """The batches, the next one in place of one that shows nothing."""
    empty: list[BatchRecord] = []
    for batch in batches:
        if batch.record is not None and batch.record.shows_nothing:
            empty.append(batch.record)
            lost = sum(len(record.samples) for record in empty)
            if lost >= _MOST_UNDECODABLE:
                raise ValueError(f"{lost} images in a row cannot be decoded: `clipyard data inspect` shows why.")
            continue
        for record in empty:
            assert batch.record is not None
            yield batch._replace(record=replace(record, samples=batch.record.samples))
        empty.clear()
        yield batch


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors of a batch, at any depth of tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)


def _put(
    ready: queue.Queue[tuple[DeviceBatch, torch.cuda.Event] | BaseException],
    item: tuple[DeviceBatch, torch.cuda.Event] | BaseException,
    stopped: threading.Event,
) -> bool:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=_POLL_S)
            return True
        except queue.Full:
            continue
    return False
