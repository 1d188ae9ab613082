"""Checks, before a run builds anything of size, that its model and optimizer can go through all of its phases.

--phases FILE -> Phases -> a model without memory for each -> refusals, FLOPs per sample
                        -> length of an epoch              -> refusals, remarks
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.factory import BuiltModel
from models.profile import training_flops
from models.text_form import cut_texts
from training.assembly import build_loader, build_model, build_plan
from training.checkpoint.epoch_loading import whole_shapes
from training.checkpoint.optimizer_state import SEPARATOR, pack_optimizer
from training.checkpoint.positions import ResizedRows, find_resizing
from training.config import OptimConfig
from training.distributed.start_up import on_first_rank
from training.optim.optimizer import build_optimizer
from training.phases import Phase, Phases, read_phases
from training.plan import TrainPlan
from training.run import Run
from training.work import Work

logger = logging.getLogger(__name__)


def agreed_phases(run: Run) -> tuple[Phases, Work]:
    """The phases of a run, and what they cost. Collective: all ranks.

    Raises:
        ValueError: the file does not describe phases, or one that the model cannot go through; on all ranks.
    """

    def read() -> tuple[Phases, Sequence[int] | None]:
        phases = read_phases(run.config)
        return phases, None if phases.path is None else check_models(phases)

    phases, flops = on_first_rank(read, rank=run.runtime.rank)
    return phases, Work(phases, flops, phases.all[0])


def check_models(phases: Phases) -> Sequence[int] | None:
    """Builds the model of every phase without memory, and counts the FLOPs of a sample; None for towers that cannot.

    Raises:
        ValueError: a phase that the model cannot go through, or not after the phases before.
    """
    counts: list[int | None] = []
    before: BuiltModel | None = None
    for phase in phases.all:
        try:
            built = build_model(phase.config, skeleton=True)
            counts.append(_check_model(phase, built))
            if before is not None:
                _check_change(phase.config.optim, before, built)
        # What a tower of others thinks of an image size, it says in its forward pass.
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"--phases {phases.path}, phase {phase.number}: {error}") from error
        before = built
    counted = [count for count in counts if count is not None]
    return counted if len(counted) == len(counts) else None


def _check_model(phase: Phase, built: BuiltModel) -> int | None:
    cut_texts(built.config, phase.text_length)
    drops = any(type(module).__name__.startswith("PatchDropout") for module in built.model.visual.modules())
    if phase.settings.get("patch_dropout") and not drops:
        raise ValueError(
            f"patch_dropout {phase.settings['patch_dropout']}: the image tower of '{built.config.name}' has no patches "
            "to drop; leave it out"
        )
    if built.config.text_cfg.hf_model_name is not None:
        return None
    image = {id(parameter) for parameter in built.model.visual.parameters()}
    trained = [parameter for parameter in built.model.parameters() if parameter.requires_grad and parameter.ndim > 0]
    return training_flops(
        built.config,
        text_length=phase.text_length,
        trains_image=any(id(parameter) in image for parameter in trained),
        trains_text=any(id(parameter) not in image for parameter in trained),
    )


def _check_change(optim: OptimConfig, before: BuiltModel, built: BuiltModel) -> None:
    """Returns if the state of one phase becomes that of the next by resizing position embeddings."""
    saved, shapes = whole_shapes(before.model), whole_shapes(built.model)
    resizing = find_resizing(built.model, shapes, saved, image_hw=before.config.vision_cfg.image_hw)
    resized = None if resizing is None else resizing.table.name
    other = [name for name in shapes if saved.get(name) != shapes[name] and name != resized]
    if other:
        raise ValueError(
            f"at this image size {other[0]} has the shape {shapes[other[0]]} and before {saved.get(other[0])}, and "
            "only position embeddings of grids are resized: keep the image size, or choose another model"
        )
    trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    if resizing is not None and resizing.table.name in trained:
        # Some keep other state of large tables than of small ones.
        for shape in (resizing.saved, resizing.table.shape):
            ResizedRows(resizing._replace(saved=shape), moments_of(optim, resizing.table.name, shape))


def moments_of(optim: OptimConfig, name: str, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what an optimizer keeps of a parameter, by PARAMETER//STATE: they show once it has taken a step."""
    model = nn.ParameterDict({"table": torch.zeros(shape)})
    optimizer = build_optimizer(model, replace(optim, wd_exclude=()))
    model["table"].grad = torch.ones(shape)
    optimizer.step()
    tensors, _ = pack_optimizer(optimizer, model)
    return {
        f"{name}{SEPARATOR}{packed.partition(SEPARATOR)[2]}": tuple(tensor.shape) for packed, tensor in tensors.items()
    }


def first_plan(run: Run, phases: Phases) -> TrainPlan | None:
    """How long an epoch of a new run is, known before anything of size is built; None without ``--phases``.

    Collective: all ranks, each of which looks at the data.

    Raises:
        ValueError: a phase whose step is more than an epoch.
    """
    if phases.path is None:
        return None
    built = build_model(run.config, skeleton=True)
    plan = build_plan(run, build_loader(run, built), epoch_batch=run.config.data.batch_size)
    phases.check(samples_per_epoch=plan.samples_per_epoch, epochs=plan.epochs, ranks=_ranks(run, plan))
    return plan


def check_length(run: Run, phases: Phases, plan: TrainPlan) -> None:
    """Says what is odd about phases, now that the length of the run is known.

    Raises:
        ValueError: a step that is more than an epoch.
    """
    for remark in phases.check(samples_per_epoch=plan.samples_per_epoch, epochs=plan.epochs, ranks=_ranks(run, plan)):
        logger.warning("%s", remark)


def _ranks(run: Run, plan: TrainPlan) -> int:
    return run.runtime.world_size * plan.accum_freq
