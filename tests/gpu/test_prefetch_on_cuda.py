"""Batches on their way to the GPU: copied from pinned memory on a side stream, in order, with the right numbers."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch

from tests.data.stream_simulation import Job, NumberSource, ids
from training.data.batch import to_device
from training.data.prefetch import load_to_device, pin

pytestmark = pytest.mark.gpu
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_batches_are_those_of_the_loader(device: torch.device, workers: int) -> None:
    whole = Job(NumberSource([9, 14, 3, 11]), 4, 5).run(1, 6, 12)
    (loader,) = Job(NumberSource([9, 14, 3, 11]), 4, 5, workers=workers).loaders(1, 6)
    convert = partial(to_device, mean=MEAN, std=STD, device=device, dtype=torch.float32)
    batches = load_to_device(iter(loader), to_device=convert, device=device)
    for expected, batch in zip(whole, islice(batches, 12), strict=True):
        torch.cuda._sleep(10_000_000)  # the step is slow: the loader runs ahead
        assert batch.record is not None
        assert ids(batch.record) == expected
        assert [tuple(row) for row in batch.texts.tolist()] == expected
        assert batch.images.device.type == "cuda"


def test_pinned_memory_is_known_to_cuda(device: torch.device) -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert not memory.is_pinned()
    pin(memory)
    assert memory.is_pinned()


def test_an_error_of_the_loader_reaches_the_trainer(device: torch.device) -> None:
    def failing():
        raise ZeroDivisionError("no batch")
        yield

    with pytest.raises(ZeroDivisionError, match="no batch"):
        next(load_to_device(failing(), to_device=lambda batch: batch, device=device))
