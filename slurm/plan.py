"""The arithmetic of a job: ranks, batches, steps, lanes, memory, checkpoints, data rate, time. Pure.

What is not known before a job runs is assumed, and every assumption is a field that the summary names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from slurm.data_facts import DataFacts
from slurm.model_facts import FoundFacts, ModelFacts, find_facts
from training.checkpoint.parts import choose_writers
from training.config import Config
from training.data.epoch import check_epoch, choose_block, epoch_length, lanes_of
from training.phases import Phases
from training.validation import check_reduce_dtype

_GIB = 2**30
_LANE_BYTES = 20
_FRAMEWORK_GIB = 2.0
"""Context of CUDA, libraries and NCCL's buffers on one GPU."""
_TEXT_BYTES = {"fp32": 8, "bf16": 6}
"""Per number of the gathered text features, by --gather-dtype: the number, and its gradient in fp32."""
_NORMALISER_BYTES = 16
"""Per text of the global batch: what the softmax over all images is made of."""
_TILES = 4
"""Of the loss, that exist at once: logits, their gradients, and what lies between."""
_TILE_BYTES = 4 * 2**23
"""fp32; training/losses/tiles.py has the size."""
NODE_HOURS_PER_FAILURE = 1024.0
"""A failure every 8 hours on 128 nodes of 8 GPUs; fewer nodes fail less often in proportion."""
_STALL_S_PER_GB = 0.25
"""That a save stops training, per GB of the rank's own part. Measured: benchmarks/results/checkpoint_stall_*.json."""
_SHORTEST_INTERVAL_MIN, _LONGEST_INTERVAL_MIN = 10, 60
_WORKER_IMAGES_PER_S = 400.0
"""That one worker decodes and crops, of 512 px; from 170 to 1,200 by size and augmentation (docs/performance.md)."""
SHORTEST_SIGNAL_S = 60
"""SLURM looks at the clock every 30 s and sends signals up to 60 s early or late."""
DEFAULT_SIGNAL_S = 300
START_UP_S = 120
"""From the start of a job to its first step."""


class Gpu(NamedTuple):
    """A kind of GPU, by its data sheet."""

    tflops: float
    """Dense bf16."""
    gib: float
    """That a process may use."""


GPUS: Mapping[str, Gpu] = {
    "v100-32": Gpu(125, 31.7),
    "a100-40": Gpu(312, 39.4),
    "a100-80": Gpu(312, 79.2),
    "h100": Gpu(989, 79.2),
    "gh200": Gpu(989, 94.5),
    "h200": Gpu(989, 139.8),
    "b200": Gpu(2250, 178.3),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know."""

    gpu: str = "a100-40"
    mfu: float = 0.2
    """Share of the GPU's peak that the model's own arithmetic reaches, without recomputation. Published CLIP runs: 0.03
    to 0.12 with ViT-B-32, 0.11 (1,024 GPUs over EFA) to 0.38 (NeMo, 128 A100) with larger models."""
    sample_kb: float = 40.0
    """Of a shard, per sample, where the shards cannot be measured from here. Source: LAION-5B, 240 TB / 5.8e9."""
    storage_gb_per_s: float = 1.0
    """At which all ranks together write a checkpoint, and at which it is read back."""


@dataclass(frozen=True)
class JobShape:
    """What is asked of SLURM."""

    nodes: int
    tasks_per_node: int
    time_limit_s: int
    signal_before_s: int | None = None
    """None: as a checkpoint needs."""

    @property
    def world_size(self) -> int:
        """Ranks: one for each task."""
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class Steps:
    """How long the run is."""

    global_batch: int
    per_epoch: int
    epochs: int
    samples_per_epoch: int
    lanes: int
    block: int
    of_phases: tuple[int, ...] = ()
    """Steps of each phase, with ``--phases``."""

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return sum(self.of_phases) if self.of_phases else self.per_epoch * self.epochs

    @property
    def samples(self) -> int:
        """Of the whole run."""
        return self.per_epoch * self.epochs * self.global_batch


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU."""

    weights: float
    gradients: float
    moments: float
    copies: float
    """Weights in the precision of computing, or what FSDP has gathered."""
    activations: float
    loss: float
    framework: float = _FRAMEWORK_GIB

    @property
    def state(self) -> float:
        """What no smaller batch makes less."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.copies + self.activations + self.loss + self.framework


@dataclass(frozen=True)
class Checkpoints:
    """What is saved, and how often."""

    gigabytes: float
    files: int
    write_s: float
    """Until it is on the disk and read back."""
    stall_s: float
    """That training waits for it."""
    minutes: int
    """Between two of them, where the configuration does not say."""


@dataclass(frozen=True)
class Speed:
    """At the assumed share of the GPU's peak."""

    samples_per_s: float
    step_s: float
    hours: float
    """For the steps that are left."""
    jobs: int
    """Of the time limit each."""
    gbit_per_s: float
    """Of shards, read by the whole job."""
    images_per_worker: float
    """That each loader worker has to decode in a second."""


class _Stretch(NamedTuple):
    """Steps that cost the same: a phase, or the whole run."""

    config: Config
    facts: ModelFacts
    steps: Steps
    """With the phase's global batch."""
    number: int
    """Of the steps."""
    left: int
    """Those that are still to be taken."""
    name: str


@dataclass(frozen=True)
class Plan:
    """Everything that can be said about a job before it runs."""

    shape: JobShape
    signal_before_s: int
    steps: Steps | None
    """None: the run only evaluates."""
    checkpoints: Checkpoints | None
    memory: Memory | None
    """None: CPUs, or a model whose size is not known."""
    speed: Speed | None
    remarks: tuple[str, ...]
    """What the user should look at."""


def make_plan(
    config: Config,
    shape: JobShape,
    *,
    data: DataFacts | None,
    model: FoundFacts,
    assumptions: Assumptions,
    phases: Phases | None = None,
    first_step: int = 0,
) -> Plan:
    """The plan of a job.

    Args:
        data: None where nothing is trained on.
        phases: of ``--phases``; None without.
        first_step: that the run goes on from.

    Raises:
        ValueError: ranks, batches, lanes or the time limit do not fit, the state of the model does not fit a GPU, or
            gradients cannot be summed as asked.
    """
    check_shards(config, shape.world_size)
    check_reduce_dtype(config.engine, world_size=shape.world_size)
    steps = plan_steps(config, data, world_size=shape.world_size) if data is not None else None
    facts = model.facts
    phase_remarks: list[str] = []
    if steps is not None and phases is not None and phases.path is not None:
        steps, phase_remarks = plan_phases(phases, steps, ranks=shape.world_size * config.engine.accum_freq)
    on_gpu = config.engine.device.startswith("cuda")
    checkpoints = None
    memory = None
    speed = None
    if steps is not None and facts is not None:
        checkpoints = plan_checkpoints(config, facts, shape, lanes=steps.lanes, assumptions=assumptions)
        if on_gpu:
            stretches = _stretches(config, facts, steps, phases, first_step=first_step)
            memories = [
                plan_memory(part.config, part.facts, part.steps, world_size=shape.world_size) for part in stretches
            ]
            memory = max(memories, key=lambda memory: memory.total)
            speeds = [_plan_speed(part, shape, data=data, assumptions=assumptions) for part in stretches]
            speed = _together(speeds, shape)
            phase_remarks += [
                f"{part.name}: {part.number:,} steps of {part.steps.global_batch:,}, {speeds[place].step_s:.3g} s "
                f"each, {memories[place].total:.1f} GiB"
                for place, part in enumerate(stretches)
                if len(stretches) > 1
            ]
    signal_before_s = choose_signal(shape, checkpoints=checkpoints, step_s=speed.step_s if speed else 0.0)
    remarks = [
        *model.remarks,
        *phase_remarks,
        *(_memory_remarks(config, memory, assumptions) if memory else ()),
        *(_speed_remarks(config, speed) if speed else ()),
    ]
    return Plan(shape, signal_before_s, steps, checkpoints, memory, speed, tuple(remarks))


def check_shards(config: Config, world_size: int) -> None:
    """Raises ValueError where ranks cannot be divided into groups that share one copy of the state."""
    ranks = config.engine.fsdp_shard_ranks
    if config.engine.fsdp and ranks and world_size % ranks:
        raise ValueError(
            f"--fsdp-shard-ranks {ranks} does not divide {world_size} ranks: pass a divisor, the GPUs of a node for "
            "example, or change --nodes."
        )


def plan_steps(config: Config, data: DataFacts, *, world_size: int) -> Steps:
    """Batches, steps and lanes.

    Raises:
        ValueError: an epoch has no global batch, or ranks would have no lane.
    """
    batch_size, accum_freq = config.data.batch_size, config.engine.accum_freq
    num_batches, samples = epoch_length(
        config.data, num_samples=data.num_samples, world_size=world_size, kind=data.kind
    )
    check_epoch(data.num_samples, num_batches, batch_size=batch_size, world_size=world_size, accum_freq=accum_freq)
    lanes = lanes_of(config.data, data.slots, world_size=world_size)
    return Steps(
        global_batch=batch_size * world_size * accum_freq,
        per_epoch=num_batches // accum_freq,
        epochs=config.schedule.epochs,
        samples_per_epoch=samples,
        lanes=lanes,
        block=config.data.shuffle_block or choose_block(lanes, world_size=world_size),
    )


def plan_phases(phases: Phases, steps: Steps, *, ranks: int) -> tuple[Steps, list[str]]:
    """With the steps of each phase, and remarks.

    Args:
        ranks: times micro-steps: batches in a step.

    Raises:
        ValueError: a step that is more than an epoch.
    """
    samples_per_epoch = steps.per_epoch * steps.global_batch
    remarks = phases.check(samples_per_epoch=samples_per_epoch, epochs=steps.epochs, ranks=ranks)
    seen, numbers = 0, []
    for phase in phases.all:
        batch = phase.config.data.batch_size * ranks
        end = steps.samples if phase.end is None else min(phase.end, steps.samples)
        numbers.append(max(0, math.ceil((end - seen) / batch)))
        seen += numbers[-1] * batch
    return replace(steps, of_phases=tuple(numbers)), remarks


def _stretches(
    config: Config, facts: ModelFacts, steps: Steps, phases: Phases | None, *, first_step: int
) -> list[_Stretch]:
    """
    Raises:
        ValueError: captions that are longer than the model reads.
    """
    if phases is None or not steps.of_phases:
        return [_Stretch(config, facts, steps, steps.total, max(0, steps.total - first_step), "the run")]
    ranks = steps.global_batch // config.data.batch_size
    stretches, done = [], 0
    for phase, number in zip(phases.all, steps.of_phases, strict=True):
        name = f"phase {phase.number} of {len(phases)} ({phase})"
        own = find_facts(phase.config.model).facts
        assert own is not None
        length = phase.text_length or own.context_length
        if length > own.context_length:
            raise ValueError(
                f"--phases {phases.path}, {name}: text_length {length} is more than the model's context of "
                f"{own.context_length} tokens: lower it, or pass --force-context-length."
            )
        share = length / own.context_length
        own = own._replace(
            text_gmac=own.text_gmac * share,
            text_mb=own.text_mb * share,
            text_checkpointed_mb=own.text_checkpointed_mb * share,
        )
        batch = replace(steps, global_batch=phase.config.data.batch_size * ranks)
        left = number - min(max(0, first_step - done), number)
        stretches.append(_Stretch(phase.config, own, batch, number, left, name))
        done += number
    return stretches


def plan_memory(config: Config, facts: ModelFacts, steps: Steps, *, world_size: int) -> Memory:
    """Of one GPU, at the peak: at the end of a forward pass, with the loss."""
    per_weight = _weight_bytes(config)
    computed = 2 if config.engine.precision != "fp32" else 4
    shards = _shard_ranks(config, world_size)
    trained = _trained_parameters(config, facts)
    if shards > 1:
        copies = _gathered_bytes(config, facts, per_number=computed)
    else:
        # Autocast keeps its copies of the weights until the backward pass has used them.
        copies = computed * facts.parameters if per_weight != computed else 0
    if config.engine.fsdp_offload_cpu and shards > 1:
        state = (0.0, 0.0, 0.0)
    else:
        state = (
            per_weight * facts.parameters / shards,
            per_weight * trained / shards,
            2 * per_weight * trained / shards,
        )
    # What the policy "selective" keeps is not counted beforehand: less than all, more than "full".
    full = config.engine.grad_checkpointing and not _is_selective(config)
    image = facts.image_checkpointed_mb if full else facts.image_mb
    text = facts.text_checkpointed_mb if full else facts.text_mb
    batch = config.data.batch_size
    activations = (image + text) * 1e6 * batch * (computed / 2)
    return Memory(
        weights=state[0] / _GIB,
        gradients=state[1] / _GIB,
        moments=state[2] / _GIB,
        copies=copies / _GIB,
        activations=activations / _GIB,
        loss=_loss_bytes(config, facts, steps.global_batch) / _GIB,
    )


def plan_checkpoints(
    config: Config, facts: ModelFacts, shape: JobShape, *, lanes: int, assumptions: Assumptions
) -> Checkpoints:
    """Size, files and interval. Young's rule: the interval is the root of 2 x stall x time between failures.

    Source: Young 1974, "A first order approximation to the optimum checkpoint interval".
    """
    per_weight = _weight_bytes(config)
    size = per_weight * (facts.parameters + 2 * _trained_parameters(config, facts)) + _LANE_BYTES * lanes
    shards = _shard_ranks(config, shape.world_size)
    writers = shards if shards > 1 else len(choose_writers(size, world_size=shape.world_size))
    stall_s = _STALL_S_PER_GB * size / 1e9 / writers
    write_s = 2 * size / 1e9 / assumptions.storage_gb_per_s
    failure_s = 3600 * NODE_HOURS_PER_FAILURE / shape.nodes
    best_s = max(math.sqrt(2 * stall_s * failure_s), 5 * write_s)
    minutes = min(max(math.ceil(best_s / 60), _SHORTEST_INTERVAL_MIN), _LONGEST_INTERVAL_MIN)
    return Checkpoints(size / 1e9, 2 * writers + 4, write_s, stall_s, minutes)


def choose_signal(shape: JobShape, *, checkpoints: Checkpoints | None, step_s: float) -> int:
    """How long before the time limit the ranks are asked to save: two steps and two saves, and a minute of SLURM's.

    Raises:
        ValueError: the time limit leaves no time to train.
    """
    needed = SHORTEST_SIGNAL_S + 2 * step_s + (2 * checkpoints.write_s if checkpoints else 0.0)
    signal_before_s = shape.signal_before_s
    if signal_before_s is None:
        signal_before_s = max(DEFAULT_SIGNAL_S, 60 * math.ceil(needed / 60))
    elif signal_before_s < SHORTEST_SIGNAL_S:
        raise ValueError(
            f"--signal-before {signal_before_s} is shorter than SLURM's clock, which signals up to {SHORTEST_SIGNAL_S} "
            f"s late: pass {SHORTEST_SIGNAL_S} or more."
        )
    elif signal_before_s < needed:
        raise ValueError(
            f"--signal-before {signal_before_s} is too short for a checkpoint: two steps, two saves and SLURM's clock "
            f"take {needed:.0f} s. Pass {60 * math.ceil(needed / 60)} or more, or leave it out."
        )
    shortest = signal_before_s + START_UP_S
    if shape.time_limit_s <= shortest:
        raise ValueError(
            f"a time limit of {shape.time_limit_s} s is too short for one checkpoint: the job needs about {START_UP_S} "
            f"s to start, and is asked to save {signal_before_s} s before its end. Pass --time with more than "
            f"{math.ceil(shortest / 60)} minutes, or a shorter --signal-before (at least {math.ceil(needed)})."
        )
    return signal_before_s


def saves_within_epochs(config: Config) -> bool:
    """Whether the configuration itself says how often to save."""
    return config.checkpoint.save_every_n_steps > 0 or config.checkpoint.save_every_n_minutes > 0


def _plan_speed(part: _Stretch, shape: JobShape, *, data: DataFacts | None, assumptions: Assumptions) -> Speed:
    # Forward and backward: 3 forward passes of 2 operations for each multiplication with addition.
    per_gpu = assumptions.mfu * GPUS[assumptions.gpu].tflops * 1e12 / (6 * part.facts.gmac * 1e9)
    samples_per_s = per_gpu * shape.world_size
    step_s = part.steps.global_batch / samples_per_s
    seconds = part.left * step_s
    sample_bytes = data.sample_bytes if data is not None else None
    if sample_bytes is None:
        sample_bytes = assumptions.sample_kb * 1e3
    return Speed(
        samples_per_s=samples_per_s,
        step_s=step_s,
        hours=seconds / 3600,
        jobs=_jobs(seconds, shape),
        gbit_per_s=8 * samples_per_s * sample_bytes / 1e9,
        images_per_worker=per_gpu / max(1, part.config.data.workers),
    )


def _together(speeds: Sequence[Speed], shape: JobShape) -> Speed:
    """Of several phases: the time of all, and of the rates the highest, which data and signals must stand."""
    hours = sum(speed.hours for speed in speeds)
    fastest = max(speeds, key=lambda speed: speed.samples_per_s)
    step_s = max(speed.step_s for speed in speeds)
    return replace(fastest, step_s=step_s, hours=hours, jobs=_jobs(3600 * hours, shape))


def _jobs(seconds: float, shape: JobShape) -> int:
    """Of the time limit each."""
    usable = max(1, shape.time_limit_s - START_UP_S - (shape.signal_before_s or DEFAULT_SIGNAL_S))
    return max(1, math.ceil(seconds / usable))


def _weight_bytes(config: Config) -> int:
    """Of a weight, its gradient and each of its two moments; without master weights they are as the weights."""
    return 2 if config.engine.precision in ("bf16", "fp16", "pure_bf16", "pure_fp16") else 4


def _is_selective(config: Config) -> bool:
    return config.engine.grad_checkpointing and config.engine.grad_checkpointing_policy == "selective"


def _shard_ranks(config: Config, world_size: int) -> int:
    """Ranks that share one copy of the state; 1 without FSDP."""
    return (config.engine.fsdp_shard_ranks or world_size) if config.engine.fsdp else 1


def _trained_parameters(config: Config, facts: ModelFacts) -> int:
    """Without towers that are locked as a whole; of partly locked ones all count."""
    trained = facts.parameters
    if config.model.lock_image and not config.model.lock_image_unlocked_groups:
        trained -= facts.image_parameters
    if config.model.lock_text and not config.model.lock_text_unlocked_layers:
        trained -= facts.parameters - facts.image_parameters
    return max(trained, 0)


def _gathered_bytes(config: Config, facts: ModelFacts, *, per_number: int) -> float:
    """What FSDP holds at a time: two blocks, what lies outside of blocks, and one block's gradients in fp32."""
    if config.engine.fsdp_no_reshard_after_forward:
        weights = facts.parameters
    else:
        weights = 2 * facts.largest_block_parameters + facts.parameters - facts.block_parameters
    return per_number * weights + (per_number + 4) * facts.largest_block_parameters


def _loss_bytes(config: Config, facts: ModelFacts, global_batch: int) -> float:
    """The same for both losses: all texts, and a few tiles of the logits of the rank's own images."""
    rows = config.data.batch_size * config.engine.accum_freq
    tiles = _TILES * min(_TILE_BYTES, 4 * rows * global_batch)
    text_bytes = _TEXT_BYTES[config.loss.gather_dtype] * facts.embed_dim
    return (text_bytes + _NORMALISER_BYTES) * global_batch + tiles


def _memory_remarks(config: Config, memory: Memory, assumptions: Assumptions) -> list[str]:
    """
    Raises:
        ValueError: not even the state fits.
    """
    available = GPUS[assumptions.gpu].gib
    remedies = [
        *([] if config.engine.grad_checkpointing else ["--grad-checkpointing"]),
        *(["--grad-checkpointing-policy full"] if _is_selective(config) else []),
        *([] if config.engine.fsdp else ["--fsdp"]),
        "a smaller --batch-size with --accum-freq",
    ]
    if memory.state > available:
        raise ValueError(
            f"weights, gradients and moments alone take {memory.state:.0f} GiB of a GPU that has {available:.0f} "
            f"({assumptions.gpu}): pass --fsdp, with more ranks to share them, or --gpu with another kind."
        )
    if memory.total > available:
        return [
            f"the memory estimate of {memory.total:.0f} GiB is more than the {available:.0f} GiB of {assumptions.gpu}: "
            f"consider {', '.join(remedies)}"
        ]
    if memory.total > 0.9 * available:
        return [f"the memory estimate is within 10 % of the GPU's: consider {', '.join(remedies)}"]
    return []


def _speed_remarks(config: Config, speed: Speed) -> list[str]:
    if speed.images_per_worker <= _WORKER_IMAGES_PER_S or config.data.dataset_type == "synthetic":
        return []
    wanted = math.ceil(speed.images_per_worker * max(1, config.data.workers) / _WORKER_IMAGES_PER_S)
    return [
        f"each of {config.data.workers} workers would have to decode {speed.images_per_worker:.0f} images/s, and "
        f"{_WORKER_IMAGES_PER_S:.0f} of 512 px are usual: consider --workers {wanted}, or smaller images"
    ]
