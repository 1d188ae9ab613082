"""How much of a job's time trains, when nodes fail: a simulation, and the formula that it must agree with.

    python -m benchmarks.scale_goodput

    work ... | stall | work ... | stall | work .. X failure -> noticed -> requeued -> started -> loaded -> again from
                                                               the newest checkpoint that was complete

Failures come at random with a mean time between them (exponential). Work since the newest complete checkpoint is done
again. A checkpoint is complete only when its files are written and read back, beside the training; training waits
only for the copy to host memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.scale_jobs import B_32_256, SECONDS_OF_MTTF, XXLARGE, Job
from benchmarks.scale_report import Result, Tables, load, run_benchmark, seconds, table

NAME = "scale_goodput"
INTERVALS_MIN = (2, 5, 7, 10, 15, 20, 30, 60)
_DAYS = 30
_EPOCH_SAVE_S = 15.0
"""torch.save of 14.4 GB by one process. Assumed: 1 GB/s."""


class Delay(NamedTuple):
    """A part of a restart."""

    name: str
    seconds: float
    source: str


FAILURES = (("a process ends", 0.80, 4.0), ("a hang", 0.05, 600.0), ("a lost node", 0.15, 300.0))
"""(kind, share, seconds until it is noticed). The shares are assumed. Noticed: measured (docs/resilience.md), our
--timeout-step, SLURM's SlurmdTimeout."""
REQUEUE_S = 120.0
"""Before a requeued job may begin. Measured on SLURM 22.05."""
MANUAL_RESTART_S = 3600.0
"""Until somebody has seen that the job is gone and started it again. Assumed; at night it is more."""


class Plan(NamedTuple):
    """How a job protects its work."""

    interval_s: float
    """Work between two checkpoints."""
    stall_s: float
    """Training waits."""
    write_s: float
    """From then on, until the checkpoint is complete."""
    restart_s: float


def restart_delays(startup: Result, checkpoints: Result) -> list[Delay]:
    """From the failure until the first step, with what the other benchmarks have measured."""
    rank, plan = startup["rank"], _plan_of(checkpoints, XXLARGE.model)
    loader_s = sum(rank[name] for name in ("build_s", "first_sample_s", "first_batch_s"))
    noticed_s = sum(share * seconds for _, share, seconds in FAILURES)
    kinds = ", ".join(f"{share:.0%} {kind} {seconds:.0f} s" for kind, share, seconds in FAILURES)
    return [
        Delay("noticed", noticed_s, f"mean of {kinds}; the shares are assumed"),
        Delay("requeued", REQUEUE_S, "measured on SLURM 22.05"),
        Delay("nodes ready, srun", 30.0, "assumed"),
        Delay("Python, imports, meeting", 60.0, "assumed: 10 s of imports measured, a shared disk is slower"),
        Delay("NCCL, first kernels", 60.0, "assumed"),
        Delay("loader, first batch", loader_s, "scale_startup, on two busy cores"),
        Delay("checkpoint loaded", plan["load_s"], "scale_checkpoints, convnext_xxlarge"),
    ]


def _plan_of(checkpoints: Result, model: str) -> dict[str, float]:
    found: dict[str, float] = next(row["plans"]["DDP"] for row in checkpoints["plans"] if row["model"] == model)
    return found


def measure(*, small: bool = False) -> Result:
    """Both jobs, with several intervals, and with checkpoints at the ends of epochs only."""
    repeats = 20 if small else 400
    checkpoints = load("scale_checkpoints")
    delays = restart_delays(load("scale_startup"), checkpoints)
    restart_s = sum(delay.seconds for delay in delays)
    # The measured stall of rank 0 in a world of 1,024, on a CPU; a GPU's copy takes less.
    stall_s = checkpoints["real"]["capture_s"]
    files = _plan_of(checkpoints, XXLARGE.model)
    write_s = files["write_s"] + files["read_back_s"]
    jobs = []
    for job in (XXLARGE, B_32_256):
        plans = {f"every {minutes} min": Plan(60.0 * minutes, stall_s, write_s, restart_s) for minutes in INTERVALS_MIN}
        best_s = young_daly(stall_s, SECONDS_OF_MTTF)
        plans["Young's and Daly's interval"] = Plan(best_s, stall_s, write_s, restart_s)
        plans |= _epoch_plans(job, restart_s)
        jobs.append(
            {
                "job": job.name,
                "epoch_s": job.samples_per_epoch / job.samples_per_s,
                "plans": {name: _evaluate(plan, repeats=repeats) for name, plan in plans.items()},
            }
        )
    return {
        "mttf_s": SECONDS_OF_MTTF,
        "stall_s": stall_s,
        "write_s": write_s,
        "restart": [delay._asdict() for delay in delays],
        "restart_s": restart_s,
        "manual_restart_s": MANUAL_RESTART_S,
        "young_daly_s": young_daly(stall_s, SECONDS_OF_MTTF),
        "days": _DAYS,
        "repeats": repeats,
        "jobs": jobs,
    }


def _epoch_plans(job: Job, restart_s: float) -> dict[str, Plan]:
    """OpenCLIP's: training waits while rank 0 writes the file."""
    epoch_s = job.samples_per_epoch / job.samples_per_s
    return {
        "epochs only, requeued": Plan(epoch_s, _EPOCH_SAVE_S, 0.0, restart_s),
        "epochs only, restarted by hand": Plan(epoch_s, _EPOCH_SAVE_S, 0.0, MANUAL_RESTART_S),
        "epoch of 2 B samples only, requeued": Plan(2e9 / job.samples_per_s, _EPOCH_SAVE_S, 0.0, restart_s),
    }


def _evaluate(plan: Plan, *, repeats: int) -> dict[str, float]:
    runs = [simulate(plan, mttf_s=SECONDS_OF_MTTF, span_s=_DAYS * 86400, seed=seed) for seed in range(repeats)]
    mean, spread = float(np.mean(runs)), float(np.std(runs))
    return {
        **plan._asdict(),
        "goodput": mean,
        "standard_error": spread / math.sqrt(repeats),
        "month_to_month": spread,
        "formula": formula(plan, mttf_s=SECONDS_OF_MTTF),
    }


def simulate(plan: Plan, *, mttf_s: float, span_s: float, seed: int) -> float:
    """Work that lasted / time, over one span."""
    random = np.random.default_rng(seed)
    now = done = 0.0
    while now < span_s:
        # From a start to the next failure; checkpoint k is complete after k (interval + stall) + write.
        life = random.exponential(mttf_s)
        run = min(life, span_s - now)
        period = plan.interval_s + plan.stall_s
        if now + life >= span_s:
            done += run / period * plan.interval_s  # nothing is lost at the end: it stops with a checkpoint
        else:
            done += max(0, math.floor((run - plan.write_s) / period)) * plan.interval_s
        now += run + _restart(plan.restart_s, mttf_s, random)
    return done / now


def _restart(restart_s: float, mttf_s: float, random: np.random.Generator) -> float:
    """A restart may fail as well, and begins anew then."""
    total = 0.0
    while (life := random.exponential(mttf_s)) < restart_s:
        total += life
    return total + restart_s


def formula(plan: Plan, *, mttf_s: float) -> float:
    """The same, exactly, for an endless job. Source: Daly 2006, without his approximations; writing beside the work.

    A life of T seconds gives floor((T - write) / period) whole intervals; T is exponential, so their mean is a
    geometric series.
    """
    period = plan.interval_s + plan.stall_s
    intervals = math.exp(-plan.write_s / mttf_s) / math.expm1(period / mttf_s)
    restart = mttf_s * math.expm1(plan.restart_s / mttf_s)
    return intervals * plan.interval_s / (mttf_s + restart)


def young_daly(stall_s: float, mttf_s: float) -> float:
    """The interval at which waiting for checkpoints costs as much as repeated work. Source: Young 1974."""
    return math.sqrt(2 * stall_s * mttf_s)


def tables(result: Result) -> Tables:
    """Markdown by name."""
    delays = [*((delay["name"], delay["seconds"], delay["source"]) for delay in result["restart"])]
    rows = [[name, f"{value:.0f} s", source] for name, value, source in delays]
    return {
        "restart": table(
            ["part of a restart", "time", "source"], [*rows, ["**all**", f"{result['restart_s']:.0f} s", ""]]
        ),
        "goodput": _goodput_table(result["jobs"]),
    }


def _goodput_table(jobs: Sequence[dict[str, Any]]) -> str:
    body = []
    for name in jobs[0]["plans"]:
        cells: list[object] = [name]
        for job in jobs:
            plan = job["plans"][name]
            lost = (1 - plan["goodput"]) * 24 * 1024
            goodput, exact = 100 * plan["goodput"], 100 * plan["formula"]
            cells += [seconds(plan["interval_s"]), f"{goodput:.1f} % ({exact:.1f})", f"{lost:,.0f}"]
        body.append(cells)
    header = ["checkpoints"]
    for job in jobs:
        header += [f"{job['job']}: interval", "goodput (formula)", "GPU-hours lost a day"]
    return table(header, body)


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
