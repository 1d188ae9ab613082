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
from benchmarks.scale_report import Result, Tables, run_benchmark, seconds, table

NAME = "scale_goodput"
INTERVALS_MIN = (2, 5, 7, 10, 15, 20, 30, 60)
_DAYS = 30


class Delay(NamedTuple):
    """A part of a restart."""

    name: str
    seconds: float
    source: str


RESTART = (
    Delay("noticed", 60.0, "assumed mean: a crash 0.5-4 s (measured), a hang 600 s, a lost node 300 s; 80 : 5 : 15"),
    Delay("requeued", 120.0, "measured on SLURM 22.05: the delay before a requeued job may begin"),
    Delay("nodes and srun", 30.0, "assumed"),
    Delay("imports, and 1,024 ranks meet", 60.0, "assumed; 8 s of imports on an idle core, a shared disk is slower"),
    Delay("NCCL, first kernels", 60.0, "assumed"),
    Delay("model, loader, first batch", 15.0, "scale_startup: seconds; model on the CPU of each rank"),
    Delay("checkpoint loaded", 30.0, "scale_checkpoints: 14.4 GB read and hashed file after file, and sent"),
)
RESTART_S = sum(delay.seconds for delay in RESTART)
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
    restart_s: float = RESTART_S


def measure(*, small: bool = False) -> Result:
    """Both jobs, with several intervals, and with checkpoints at the ends of epochs only."""
    repeats = 20 if small else 400
    stall_s, write_s = 1.0, 45.0
    jobs = []
    for job in (XXLARGE, B_32_256):
        plans = {f"every {minutes} min": Plan(60.0 * minutes, stall_s, write_s) for minutes in INTERVALS_MIN}
        plans |= _epoch_plans(job)
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
        "restart": [delay._asdict() for delay in RESTART],
        "restart_s": RESTART_S,
        "manual_restart_s": MANUAL_RESTART_S,
        "young_daly_s": young_daly(stall_s, SECONDS_OF_MTTF),
        "days": _DAYS,
        "repeats": repeats,
        "jobs": jobs,
    }


def _epoch_plans(job: Job) -> dict[str, Plan]:
    """OpenCLIP's: training waits while rank 0 writes the file (torch.save, 1 GB/s assumed: 15 s)."""
    epoch_s = job.samples_per_epoch / job.samples_per_s
    return {
        "epochs only, requeued": Plan(epoch_s, 15.0, 0.0),
        "epochs only, restarted by hand": Plan(epoch_s, 15.0, 0.0, MANUAL_RESTART_S),
        "epoch of 2 B samples only, requeued": Plan(2e9 / job.samples_per_s, 15.0, 0.0),
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
