"""Puts a run where it stood: from a checkpoint of its own, of its parent, or from a file of OpenCLIP's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from training.checkpoint.config_change import ConfigChange, check_config_change, remarks
from training.checkpoint.run_state import RunParts, names_a_run, restore
from training.phases import Phases
from training.plan import TrainPlan
from training.resilience.escalation import Escalation
from training.run import Origin, Run, Source

logger = logging.getLogger(__name__)


def resume(run: Run, parts: RunParts, source: Source, *, plan: TrainPlan, phases: Phases) -> Origin:
    """Restores what ``--resume`` or ``--branch-from`` names, if its settings allow that. Collective: all ranks.

    Args:
        run: with the settings of the flags.
    """
    branch = source.branch
    if source.path is None:
        return Origin()
    change = ConfigChange()

    def judge(saved: Mapping[str, Any]) -> None:
        nonlocal change
        branches = branch is not None
        change = check_config_change(
            saved, run.config, world_size=run.runtime.world_size, phases=phases.as_json(), branches=branches
        )
        parts.loader.accepts_new_stream = branches or change.allows_other_data
        for line in remarks(change, saved, run.config):
            logger.info("%s", line)

    loaded = load(
        source.path,
        run,
        parts,
        plan=plan,
        phases=phases,
        fall_back=branch is None and names_a_run(str(run.config.checkpoint.resume)),
        judge=judge,
    )
    if change.unsettles and parts.guard is not None and parts.escalation is not None:
        parts.guard.settle()
        parts.escalation.settle()
    if parts.escalation is not None and (branch is not None or {"lr", "beta2"} & change.as_json().keys()):
        # Somebody has decided anew what the guard had lowered.
        parts.escalation.load_state_dict(Escalation(run.config.resilience).state_dict())
    return Origin(loaded, change.as_json(), None if branch is None else branch.as_json())


def load(path: str, run: Run, parts: RunParts, *, plan: TrainPlan, phases: Phases, **options: Any) -> str:
    """``restore``, and a line in the log; returns which checkpoint it was. Collective: all ranks."""
    state = parts.state
    loaded = restore(
        path,
        parts,
        runtime=run.runtime,
        steps_per_epoch=plan.steps_per_epoch,
        samples_per_step=plan.samples_per_step,
        **options,
    )
    if loaded.endswith(".pt"):
        # It tells its epoch only. The run has taken the steps that it would take on its way there now.
        state.samples_seen = state.step // plan.steps_per_epoch * plan.samples_per_epoch
        state.step = phases.steps_until(state.samples_seen, ranks=run.runtime.world_size * plan.accum_freq)
    logger.info("Resumed from %s at step %d (%d samples seen).", loaded, state.step, state.samples_seen)
    return loaded
