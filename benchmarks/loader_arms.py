"""One loader in a process of its own that draws batches when told to: ``python -m benchmarks.loader_arms NAME``.

    stdin:  {"flags": [...]}           {"discard": 4, "seconds": 3.0, "multiple": 2}   ...
    stdout: {"versions": {...}}        {"samples": 1024, "wall_s": ..., "cpu_s": ..., ...}   ...

Both arms take the same training flags. OpenCLIP's arm imports nothing of ours: it runs on the webdataset it asks for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from benchmarks.process_meter import memory, process_tree, usage

_FULL_SHUFFLE_BUFFER = 5000


class Drawn(NamedTuple):
    """One batch as the loader handed it out."""

    samples: int
    counts: Counter[str]
    """What the loader says of itself; OpenCLIP's says nothing."""


def clipyard_batches(flags: Sequence[str]) -> Iterator[Drawn]:
    """Our training loader, as a training process on the CPU builds it."""
    # Here, not above: the other arm's process must not import it.
    from models.config import PreprocessConfig, load_model_config
    from models.tokenizer import build_tokenizer
    from training.cli import parse_args
    from training.data.build import build_train_loader

    config = parse_args(flags)
    loader = build_train_loader(
        config.data,
        config.image,
        preprocess=PreprocessConfig(size=(224, 224)),
        tokenizer=build_tokenizer(load_model_config("ViT-B-32")),
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=0,
    )
    for batch in loader:
        loader.commit(batch.record)
        yield Drawn(len(batch.images), batch.record.counts)


def open_clip_batches(flags: Sequence[str]) -> Iterator[Drawn]:
    """OpenCLIP's own loader with its defaults, from the functions that its training program calls.

    Its shuffle buffer is filled before the first sample. By default it grows by a sample with every sample that it
    yields, up to the same size: a short measurement would see less memory than training has.
    """
    from open_clip.factory import get_tokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train import data
    from open_clip_train.params import parse_args

    data._SAMPLE_SHUFFLE_INITIAL = _FULL_SHUFFLE_BUFFER
    args: Any = parse_args(list(flags))
    args.distributed, args.world_size, args.rank = False, 1, 0
    train = image_transform_v2(PreprocessCfg(size=224), is_train=True, aug_cfg=args.aug_cfg)
    info = data.get_data(args, (train, None), epoch=0, tokenizer=get_tokenizer("ViT-B-32"))["train"]
    for images, _ in info.dataloader:
        yield Drawn(len(images), Counter())


ARMS: dict[str, Callable[[Sequence[str]], Iterator[Drawn]]] = {
    "clipyard": clipyard_batches,
    "open_clip": open_clip_batches,
}


def draw(batches: Iterator[Drawn], *, discard: int, seconds: float, multiple: int) -> dict[str, Any]:
    """Takes batches for a while; the clock starts with the last of those that are dropped.

    Args:
        discard: batches that do not count, some of whose work was done before.
        multiple: of batches, so that every worker has loaded as many.
    """
    for _ in range(discard):
        next(batches)
    processes = process_tree(os.getpid())
    before, start = usage(processes), time.perf_counter()
    counts: Counter[str] = Counter()
    taken = samples = 0
    while taken % multiple or time.perf_counter() - start < seconds:
        drawn = next(batches)
        samples += drawn.samples
        counts += drawn.counts
        taken += 1
    wall_s = time.perf_counter() - start
    after = usage(processes)
    workers = [pid for pid in processes if pid != os.getpid()]
    return {
        "samples": samples,
        "wall_s": wall_s,
        **{name: now - then for name, now, then in zip(after._fields, after, before, strict=True)},
        "loader_memory": memory(workers)._asdict(),  # of all processes but this one together
        "all_memory": memory(processes)._asdict(),
        "counts": counts,
    }


def main(arm: str) -> None:
    """Serves requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    requests = (json.loads(line) for line in sys.stdin)
    batches = ARMS[arm](next(requests)["flags"])
    answers.write(json.dumps({"versions": {name: _version(name) for name in ("torch", "webdataset", "timm")}}) + "\n")
    for request in requests:
        answers.write(json.dumps(draw(batches, **request)) + "\n")
    os._exit(0)  # loader processes may be stopped: nothing to wait for


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(sys.argv[1])
