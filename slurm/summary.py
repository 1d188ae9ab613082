"""Says in a page what a job will do and need, and which of its numbers are assumptions."""

from __future__ import annotations

import textwrap

from slurm.batch_script import BatchJob
from slurm.data_facts import DataFacts
from slurm.plan import GPUS, NODE_HOURS_PER_FAILURE, START_UP_S, Assumptions, Plan, Speed, Steps
from training.config import Config

_INDENT, _PAGE = 12, 118


def summarise(
    job: BatchJob,
    config: Config,
    plan: Plan,
    *,
    data: DataFacts | None,
    assumptions: Assumptions,
    first_step: int,
    assumed: tuple[str, ...] = (),
    remarks: tuple[str, ...] = (),
) -> str:
    """The page, one topic a paragraph."""
    rows = [("run", f"{job.run}"), ("job", _job(job, plan))]
    if plan.steps is None:
        rows.append(("steps", "none: there is no training data, so the run only evaluates"))
    else:
        rows.append(("batch", _batch(config, plan.steps, plan.shape.world_size)))
        rows.append(("steps", _steps(plan.steps, first_step)))
        if data is not None:
            rows.append(("data", _data(config, data, plan, assumptions)))
    if plan.memory is not None:
        rows.append(("memory", _memory(config, plan, assumptions)))
    if plan.checkpoints is not None:
        rows.append(("checkpoints", _checkpoints(config, plan)))
    if plan.speed is not None:
        rows.append(("time", _time(plan.speed, plan, job, first_step)))
    rows += [("assumed", line) for line in (*_assumed(plan, data, assumptions), *assumed)]
    rows += [("note", line) for line in (*plan.remarks, *remarks)]
    paragraphs = []
    for place, (topic, text) in enumerate(rows):
        first = f"{'' if _repeats(rows, place) else topic:<{_INDENT}}"
        paragraphs.append(
            textwrap.fill(
                text,
                _PAGE,
                initial_indent=first,
                subsequent_indent=" " * _INDENT,
                break_on_hyphens=False,
                break_long_words=False,
            )
        )
    return "".join(f"{paragraph}\n" for paragraph in paragraphs)


def _repeats(rows: list[tuple[str, str]], place: int) -> bool:
    return place > 0 and rows[place][0] == rows[place - 1][0] == "assumed"


def _job(job: BatchJob, plan: Plan) -> str:
    where = [
        f"site {job.site}",
        *([f"partition {job.partition}"] if job.partition else []),
        *([f"account {job.account}"] if job.account else []),
        *([f"array {job.array}, each task a run {job.name}-TASK with its own seed"] if job.array else []),
        *([f"without {', '.join(job.exclude)}"] if job.exclude else []),
    ]
    unit = "GPUs" if job.gpus_per_node else "tasks"
    return (
        f"{job.nodes} nodes x {job.tasks_per_node} {unit} = {plan.shape.world_size:,} ranks; limit {job.time_limit}, "
        f"asked to save {plan.signal_before_s} s before it; {', '.join(where)}"
    )


def _batch(config: Config, steps: Steps, world_size: int) -> str:
    return (
        f"{steps.global_batch:,} = {config.data.batch_size} per rank x {world_size:,} ranks x "
        f"{config.engine.accum_freq} micro-steps"
    )


def _steps(steps: Steps, first_step: int) -> str:
    left = f", {steps.total - first_step:,} of them left" if first_step else ""
    if steps.of_phases:
        shown = " + ".join(f"{number:,}" for number in steps.of_phases)
        return (
            f"{shown} in {len(steps.of_phases)} phases = {steps.total:,}{left}; {steps.epochs} epochs, "
            f"{_count(steps.samples)} samples in all"
        )
    return (
        f"{steps.per_epoch:,} an epoch ({steps.samples_per_epoch:,} samples) x {steps.epochs} epochs = "
        f"{steps.total:,}{left}; {_count(steps.samples)} samples in all"
    )


def _data(config: Config, data: DataFacts, plan: Plan, assumptions: Assumptions) -> str:
    assert plan.steps is not None
    world_size = plan.shape.world_size
    what = f"{data.num_shards:,} shards" if data.num_shards else data.kind
    how = ", resampled" if config.data.dataset_resampled else ""
    text = (
        f"{what}{how}; {plan.steps.lanes:,} lanes ({plan.steps.lanes / world_size:g} a rank), shuffled in blocks of "
        f"{plan.steps.block}"
    )
    if plan.speed is None or data.kind == "synthetic":
        return text
    source = "measured on the shards" if data.sample_bytes is not None else "assumed"
    size = data.sample_bytes / 1e3 if data.sample_bytes is not None else assumptions.sample_kb
    per_node = plan.speed.gbit_per_s / plan.shape.nodes
    return (
        f"{text}; at {size:.0f} kB a sample ({source}) it reads {plan.speed.gbit_per_s / 8:.2f} GB/s = "
        f"{plan.speed.gbit_per_s:.1f} Gbit/s for the job, {per_node:.2g} Gbit/s a node"
    )


def _memory(config: Config, plan: Plan, assumptions: Assumptions) -> str:
    memory = plan.memory
    assert memory is not None
    kept = "checkpointed" if config.engine.grad_checkpointing else "all kept"
    if config.engine.grad_checkpointing and config.engine.grad_checkpointing_policy == "selective":
        kept = "at most: as if all were kept, --grad-checkpointing-policy selective keeps less"
    copies = "gathered blocks" if config.engine.fsdp else "copies for computing"
    how = "FSDP" if config.engine.fsdp else "DDP"
    return (
        f"{memory.total:.1f} of {GPUS[assumptions.gpu].gib:.1f} GiB a GPU with {how}: weights {memory.weights:.2f}, "
        f"gradients {memory.gradients:.2f}, moments {memory.moments:.2f}, {copies} {memory.copies:.2f}, activations "
        f"{memory.activations:.1f} ({kept}), loss {memory.loss:.2f}, CUDA and NCCL {memory.framework:.1f}"
    )


def _checkpoints(config: Config, plan: Plan) -> str:
    found = plan.checkpoints
    assert found is not None
    checkpoint = config.checkpoint
    every = [
        *([f"{checkpoint.save_every_n_steps:,} steps"] if checkpoint.save_every_n_steps else []),
        *([f"{checkpoint.save_every_n_minutes:g} minutes"] if checkpoint.save_every_n_minutes else []),
        "epoch",
    ]
    text = (
        f"every {' and every '.join(every)}; {found.gigabytes:.2f} GB in {found.files} files, about "
        f"{found.write_s:.0f} s to write and read back, training waits {found.stall_s:.2g} s"
    )
    if plan.speed is None:
        return text
    minutes = [
        *([checkpoint.save_every_n_steps * plan.speed.step_s / 60] if checkpoint.save_every_n_steps else []),
        *([checkpoint.save_every_n_minutes] if checkpoint.save_every_n_minutes else []),
        plan.steps.per_epoch * plan.speed.step_s / 60 if plan.steps else 0.0,
    ]
    return f"{text}; a crash costs {min(minutes) / 2:.0f} minutes of work on average"


def _time(speed: Speed, plan: Plan, job: BatchJob, first_step: int) -> str:
    left = "what is left" if first_step else "the run"
    jobs = f"{speed.jobs:,} jobs" if speed.jobs > 1 else "one job"
    return (
        f"{_count(speed.samples_per_s)} samples/s ({speed.samples_per_s / plan.shape.world_size:,.0f} a GPU), "
        f"{speed.step_s:.2f} s a step; {left} takes {_hours(speed.hours)}, {jobs} of {job.time_limit} (it requeues by "
        "itself), failures not counted"
    )


def _assumed(plan: Plan, data: DataFacts | None, assumptions: Assumptions) -> list[str]:
    lines = []
    if plan.speed is not None:
        gpu = GPUS[assumptions.gpu]
        slow, fast = plan.speed.hours * assumptions.mfu / 0.1, plan.speed.hours * assumptions.mfu / 0.4
        lines.append(
            f"{100 * assumptions.mfu:g} % of {assumptions.gpu}'s {gpu.tflops:g} TFLOP/s (--gpu, --mfu); at 10 % it "
            f"takes {_hours(slow)}, at 40 % {_hours(fast)}. Published runs: 3 to 12 % with ViT-B-32, 11 to 38 % with "
            "larger models"
        )
        if data is not None and data.sample_bytes is None and data.kind != "synthetic":
            lines.append(f"{assumptions.sample_kb:g} kB a sample, LAION-5B's mean (--sample-kb)")
    if plan.memory is not None:
        lines.append("activations counted in bf16 without --torchcompile; fragmentation is not")
    if plan.checkpoints is not None:
        lines.append(
            f"{assumptions.storage_gb_per_s:g} GB/s for writing checkpoints (--storage-gb-per-s), a failure every "
            f"{_hours(NODE_HOURS_PER_FAILURE / plan.shape.nodes)}, {START_UP_S} s to start"
        )
    return lines


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def _count(number: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
