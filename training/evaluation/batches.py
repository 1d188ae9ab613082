"""Decodes and batches this rank's share of an evaluation set, in loader processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.data.decode import ImageTransform, UnusableSample, decode_image
from training.evaluation.samples import EvaluationSample, SampleSource
from training.evaluation.zero_shot import Tokenizer
from training.resilience.preemption import shield_worker


class EvaluationBatch(NamedTuple):
    """Up to ``batch_size`` samples. B samples, C captions of all of them together."""

    positions: Tensor
    """int64 [B]: places in the whole set."""
    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: Tensor
    """int64 [B]."""
    texts: Tensor
    """int64 [C, L]."""
    text_owners: Tensor
    """int64 [C]: for each caption the position of its image."""
    fault: str = ""
    """Why no further batch can be had: raised in a loader process, an error would arrive as a traceback."""


@dataclass(frozen=True)
class Loading:
    """How evaluation sets are read on this rank."""

    transform: ImageTransform
    tokenizer: Tokenizer
    batch_size: int
    workers: int
    rank: int
    world_size: int
    pin_memory: bool = False
    max_image_pixels: int = 0


def evaluation_batches(source: SampleSource, loading: Loading) -> Iterator[EvaluationBatch]:
    """This rank's share of a set in batches; over all ranks every sample comes exactly once.

    Raises:
        ValueError: an image is broken or a sample unreadable. None is ever left out: a metric belongs to a known set.
    """
    workers = _useful_workers(source, loading)
    loader = DataLoader(
        _Share(source, loading, processes=max(1, workers)),
        batch_size=None,
        num_workers=workers,
        pin_memory=loading.pin_memory,
        # Streams may be remote, and the network client of a process that has read remotely does not survive a fork.
        multiprocessing_context="forkserver" if workers and source.num_samples is None else None,
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # the global one belongs to training, which must not notice an evaluation
    )
    for batch in loader:
        if batch.fault:
            raise ValueError(batch.fault)
        yield batch


def _useful_workers(source: SampleSource, loading: Loading) -> int:
    """No more processes than batches: starting one takes longer than decoding a small set."""
    if source.num_samples is None:
        return loading.workers
    batches = -(-source.num_samples // (loading.world_size * loading.batch_size))
    return min(loading.workers, batches)


class _Share(IterableDataset[EvaluationBatch]):
    """What one loader process of one rank reads."""

    def __init__(self, source: SampleSource, loading: Loading, *, processes: int) -> None:
        self.source = source
        self.loading = loading
        self.processes = processes

    def __iter__(self) -> Iterator[EvaluationBatch]:
        info = get_worker_info()
        worker = info.id if info else 0
        loading = self.loading
        part = loading.rank + loading.world_size * worker
        samples = self.source.part(part, loading.world_size * self.processes)
        while True:
            try:
                chunk = list(islice(samples, loading.batch_size))
                if not chunk:
                    return
                batch = self._collate(chunk)
            except (ValueError, OSError, RuntimeError) as error:
                yield _faulty(f"{error} ({self.source.flag})")
                return
            yield batch

    def _collate(self, samples: Sequence[EvaluationSample]) -> EvaluationBatch:
        captions = [caption for sample in samples for caption in sample.captions]
        owners = [sample.position for sample in samples for _ in sample.captions]
        return EvaluationBatch(
            positions=torch.tensor([sample.position for sample in samples]),
            images=torch.stack([self._image(sample) for sample in samples]),
            labels=torch.tensor([sample.label for sample in samples]),
            texts=self.loading.tokenizer(captions) if captions else torch.zeros(0, 0, dtype=torch.int64),
            text_owners=torch.tensor(owners, dtype=torch.int64),
        )

    def _image(self, sample: EvaluationSample) -> Tensor:
        try:
            image = decode_image(sample.image, max_pixels=self.loading.max_image_pixels)
        except UnusableSample as fault:
            raise ValueError(
                f"{sample.origin[:1].upper()}{sample.origin[1:]}: {fault.reason.replace('_', ' ')}. An evaluation "
                "never leaves samples out: repair or remove it."
            ) from fault
        return self.loading.transform(image)


def _faulty(fault: str) -> EvaluationBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return EvaluationBatch(nothing, nothing, nothing, nothing, nothing, fault)
