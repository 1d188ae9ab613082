"""What a run needs to go on from where it is, and how it is put back; ``capture`` takes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.clip import Clip
from models.config import load_model_config
from training.checkpoint.beta2 import carry_beta2
from training.checkpoint.checkpointer import Checkpointer, check_usable, none_is_whole
from training.checkpoint.config_change import saved_global_batch
from training.checkpoint.epoch_loading import agree_on_epoch_file, check_shapes, send, send_weights, whole_shapes
from training.checkpoint.export import newest_epoch_file, newest_readable_epoch_file
from training.checkpoint.foreign_optimizer import load_foreign_optimizer
from training.checkpoint.manifest import DamagedCheckpoint, verify
from training.checkpoint.optimizer_state import SEPARATOR, check_optimizer_names, unpack_optimizer
from training.checkpoint.positions import ResizedRows, find_resizing
from training.checkpoint.rows import StateRows, WeightRows, check_state_shapes
from training.checkpoint.step_loading import FilePlan, StepPlan, TensorStream, agree_on_plan, check_equal
from training.checkpoint.tags import rewind_order
from training.checkpoint.tensor_file import Entry
from training.data.lanes import mix
from training.data.loader import TrainLoader
from training.data.position import StreamIdentity, read_position
from training.distributed.collectives import broadcast_object
from training.distributed.runtime import Runtime
from training.distributed.sharding import ShardGroup, placements, shard_group
from training.distributed.start_up import on_first_rank
from training.optim.optimizer import set_beta2
from training.resilience.escalation import Escalation
from training.resilience.guard import StepGuard
from training.state import TrainState

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Something whose state fits into JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that have state; ``model`` is the plain module, not a data-parallel wrapper."""

    model: Clip
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loader: TrainLoader
    state: TrainState
    guard: StepGuard | None = None
    escalation: Escalation | None = None
    phase: Mapping[str, Any] = field(default_factory=lambda: {"number": 1})
    """Of the curriculum: its number, and what it sets."""
    resizes_positions: bool = False
    """Whether a checkpoint of another image size fits: its position embeddings are resized."""


def find_resume_path(
    resume: str, *, checkpoints: Path | None, verified: bool = True, allow_restart_from_zero: bool = False
) -> str | None:
    """What ``--resume`` stands for; None if it is 'latest' and there is nothing yet. On rank 0.

    'latest' is the newest whole step checkpoint in ``checkpoints``, else the newest ``epoch_N.pt`` (a run that
    OpenCLIP began).

    Args:
        verified: read every byte; not needed where ``restore`` does so anyway and falls back.
        allow_restart_from_zero: if no step checkpoint can be used, put all of them aside, and go on from the newest
            epoch file that can be read, or else start from the beginning: as a later start without this would.

    Raises:
        ValueError: not a checkpoint. DamagedCheckpoint: there are step checkpoints, and none is whole.
    """
    check = check_usable if allow_restart_from_zero else verify if verified else _take_as_it_is
    if resume == "latest":
        if checkpoints is None:
            raise ValueError("--resume latest with --logs none: there is no run directory to look in; pass a path.")
        find_file = newest_readable_epoch_file if allow_restart_from_zero else newest_epoch_file
        try:
            found = Checkpointer(checkpoints).newest(check=check) or find_file(checkpoints)
        except DamagedCheckpoint as damage:
            if not allow_restart_from_zero:
                raise
            kept = ", ".join(map(str, Checkpointer(checkpoints).set_aside()))
            found = find_file(checkpoints)
            plan = "Starting from the beginning" if found is None else f"Going on from {found}"
            logger.warning("%s %s; they are kept as %s.", damage, plan, kept)
        return None if found is None else str(found)
    if "://" in resume or resume.endswith(".pt"):
        return resume
    path = Path(resume)
    nested = Checkpointer(path / "checkpoints").newest(check=check)
    if nested is not None:
        return str(nested)
    if not (path / "train.json").is_file():
        raise ValueError(f"{resume!r} is no checkpoint (a step_N directory, a run, or a .pt file): correct --resume.")
    return resume


def _take_as_it_is(path: Path) -> None:
    """For those who verify it later."""


def names_a_run(resume: str) -> bool:
    """Whether ``--resume`` leaves open which checkpoint: then a damaged one is passed over for the one before."""
    return not ("://" in resume or resume.endswith(".pt") or (Path(resume) / "train.json").is_file())


def restore(
    path: str,
    parts: RunParts,
    *,
    runtime: Runtime,
    steps_per_epoch: int,
    samples_per_step: int,
    fall_back: bool = False,
    judge: Callable[[Mapping[str, Any]], None] | None = None,
) -> str:
    """Loads a step checkpoint, or a ``.pt`` in OpenCLIP's layout (which starts at the beginning of an epoch).

    Collective: all ranks, with rank 0's path. Every file is read by one rank.

    Args:
        fall_back: if the checkpoint is damaged, the others beside it are tried, newest first.
        judge: told the train.json of a step checkpoint before anything of it is loaded; raises ValueError to refuse.

    Returns:
        Which checkpoint was loaded.

    Raises:
        ValueError: another architecture, other trained parameters, or another data stream.
        DamagedCheckpoint: the directory is not what was written, or its weights are not finite; on all ranks.
    """
    if path.endswith(".pt"):
        _restore_epoch_file(
            path, parts, runtime=runtime, steps_per_epoch=steps_per_epoch, samples_per_step=samples_per_step
        )
    else:
        others = Checkpointer(Path(path).parent).candidates() if fall_back and runtime.is_main else []
        path = str(_load_first_whole(others or [Path(path)], parts, runtime=runtime, go_on=True, judge=judge))
    return path


def rewind(directory: Path, parts: RunParts, *, runtime: Runtime) -> None:
    """Takes weights, optimizer, loss scaler and guard back to a checkpoint; data and counters go on.

    Collective: all ranks.

    Raises:
        DamagedCheckpoint: the directory is not what was written; on all ranks. The weights are worthless then.
    """
    _load_first_whole([directory], parts, runtime=runtime, go_on=False)


def rewind_before(onset: int, checkpointer: Checkpointer, parts: RunParts, *, runtime: Runtime) -> Path:
    """Rewinds to the best checkpoint from before a step, as rank 0 sees the directory; returns which.

    Collective: all ranks.

    Raises:
        DamagedCheckpoint: there is none that is whole; on all ranks.
    """
    steps = rewind_order(checkpointer.steps(), checkpointer.tags(), onset=onset) if runtime.is_main else []
    return _load_first_whole([checkpointer.path(step) for step in steps], parts, runtime=runtime, go_on=False)


def _load_first_whole(
    candidates: Sequence[Path],
    parts: RunParts,
    *,
    runtime: Runtime,
    go_on: bool,
    judge: Callable[[Mapping[str, Any]], None] | None = None,
) -> Path:
    """Loads the first of rank 0's candidates that is whole: ranks may see a busy file system differently."""
    damages: list[str] = []
    candidates = broadcast_object(list(candidates))  # collective: all ranks
    for path in candidates:
        try:
            plan = agree_on_plan(path, rank=runtime.rank)  # collective: all ranks
            if judge is not None:
                judge(plan.train)
            _load(plan, parts, runtime=runtime, go_on=go_on)  # collective: all ranks
        except DamagedCheckpoint as damage:
            if runtime.is_main:
                logger.warning("A damaged checkpoint is passed over: %s.", damage)
            damages.append(str(damage))
        else:
            return path
    if not candidates:
        raise DamagedCheckpoint("There is no checkpoint to go back to.")
    raise none_is_whole(candidates[0].parent, damages)


def _load(plan: StepPlan, parts: RunParts, *, runtime: Runtime, go_on: bool) -> None:
    """Loads a checkpoint; with ``go_on`` also where the run stood. Collective: all ranks."""
    resized = _check_fit(plan, parts, runtime=runtime)
    train = plan.train
    stream = TensorStream(runtime)
    weights, optimizer = WeightRows(parts.model), StateRows(parts.model)
    parts.optimizer.state.clear()  # what is read now takes its place in memory
    stream.read(plan.files["model"], resized.before(weights.take), finite=True)  # collective: all ranks
    stream.read(plan.files["optimizer"], resized.before(optimizer.take))  # collective: all ranks
    data = _read_small(stream, plan.files["data"]) if go_on else {}
    rng = _read_small(stream, plan.files["rng"]) if go_on else {}
    stream.agree()
    resized.put(weights, optimizer, runtime=runtime)  # collective: all ranks
    for name in resized.names:
        del stream.dtypes[name]  # other bits than the file's: only the ranks can be compared
    shapes = resized.fitted({**plan.names("model"), **plan.names("optimizer")})
    tensors = {**weights.tensors, **optimizer.tensors}
    _check_equal(plan, tensors, shapes=shapes, stream=stream, model=parts.model, runtime=runtime)
    if go_on:
        _load_stateful(parts.escalation, train.get("escalation"))
        _lower_beta2(parts)
    unpack_optimizer(parts.optimizer, parts.model, optimizer.tensors, train["optimizer"])
    carry_beta2(parts.optimizer, train.get("param_groups", ()))
    if parts.scaler is not None and train["scaler"] is not None:
        parts.scaler.load_state_dict(train["scaler"])
    _load_stateful(parts.guard, train.get("guard"))
    if train.get("phase", parts.phase) != parts.phase:
        _settle(parts, go_on=go_on)
    if go_on:
        position = read_position(data, train["data"])
        parts.loader.load_position(position)
        _restore_rng(rng, step=int(train["step"]), saved_world_size=train["world_size"], runtime=runtime)
        parts.state.step = int(train["step"])
        parts.state.samples_seen = int(train["samples_seen"])
        parts.state.schedule_batch = int(train.get("schedule_batch") or saved_global_batch(train))
        parts.state.last_batch = int(train.get("last_batch", 0))
        parts.state.samples_per_epoch = _epoch_as_before(train, position.identity, parts.loader.identity)


def _read_small(stream: TensorStream, files: Sequence[FilePlan]) -> dict[str, Tensor]:
    """Tensors that all ranks need, and that take no memory to speak of."""
    tensors: dict[str, Tensor] = {}

    def take(entry: Entry, tensor: Tensor) -> None:
        tensors[entry.name] = tensor.cpu().clone()

    stream.read(files, take)  # collective: all ranks
    return tensors


def _check_equal(
    plan: StepPlan,
    tensors: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    stream: TensorStream,
    model: Clip,
    runtime: Runtime,
) -> None:
    group = shard_group(model) or ShardGroup(0, 1, replica=runtime.rank, replicas=runtime.world_size)
    places = placements(model)
    pieces = {
        name
        for name, shape in shapes.items()
        if (place := places.get(name.partition(SEPARATOR)[0])) is not None and place.full_shape == shape
    }
    check_equal(plan, tensors, stream=stream, pieces=pieces, group=group)  # collective: all ranks


def _epoch_as_before(train: Mapping[str, Any], saved: StreamIdentity, now: StreamIdentity) -> int:
    """Samples of an epoch as the first start counted them; 0 if that is not known, or if there is more or less data."""
    before, after = (round(identity.slots_per_epoch * identity.slot_samples) for identity in (saved, now))
    return int(train.get("samples_per_epoch", 0)) if before == after else 0


def _settle(parts: RunParts, *, go_on: bool) -> None:
    """Another phase begins here, or the weights are of one that is over: the losses were others then."""
    if parts.guard is not None:
        parts.guard.settle()
    if parts.escalation is not None and go_on:
        parts.escalation.settle()


def _check_fit(plan: StepPlan, parts: RunParts, *, runtime: Runtime) -> ResizedRows:
    """Before anything is overwritten: the checkpoint's tensors are this model's and this optimizer's.

    Returns:
        How the position embeddings become so, if they are allowed to.

    Raises:
        ValueError: they are not. DamagedCheckpoint: because the file that names them is damaged.
    """
    try:
        resized = _find_resized(plan, parts, runtime=runtime)  # collective: all ranks
        check_shapes(resized.fitted(plan.names("model")), parts.model)
        check_state_shapes(parts.model, resized.fitted(plan.names("optimizer")))
        check_optimizer_names(parts.optimizer, parts.model, [*plan.names("optimizer"), *plan.train["optimizer"]])
    except ValueError:
        fault = ""
        if runtime.is_main:
            try:
                verify(plan.directory)
            except DamagedCheckpoint as damage:
                fault = str(damage)
        if fault := broadcast_object(fault):  # collective: all ranks, since all came to the same conclusion
            raise DamagedCheckpoint(fault) from None
        raise
    return resized


def _find_resized(plan: StepPlan, parts: RunParts, *, runtime: Runtime) -> ResizedRows:
    """Collective: all ranks."""
    if not parts.resizes_positions:
        return ResizedRows(None, {})
    image_hw = on_first_rank(lambda: image_hw_of(plan.train), rank=runtime.rank)  # collective: all ranks
    saved, shapes = plan.names("model"), whole_shapes(parts.model)
    resizing = find_resizing(parts.model, shapes, saved, image_hw=image_hw)
    if resizing is not None:
        logger.info(
            "Position embeddings of %d x %d patches are resized to %d x %d, and their moments.",
            *(*resizing.old, *resizing.table.grid),
        )
    return ResizedRows(resizing, plan.names("optimizer"))


def image_hw_of(train: Mapping[str, Any]) -> tuple[int, int] | None:
    """Image size that a checkpoint was trained with; None if it was written by an earlier version and does not tell."""
    settings = {**train.get("config", {}), **train.get("phase", {})}
    size = train.get("image_size") or settings.get("image_size") or settings.get("force_image_size")
    if size is not None:
        return int(size[0]), int(size[-1])
    try:
        return load_model_config(str(settings["model"])).vision_cfg.image_hw
    except (KeyError, ValueError, OSError):
        return None


def _lower_beta2(parts: RunParts) -> None:
    """A run that was saved while beta2 was lowered goes on with it. Before any state is loaded: only the setting."""
    configured = [group["betas"][1] for group in parts.optimizer.param_groups if "betas" in group]
    if configured and parts.escalation is not None and parts.escalation.beta2 is not None:
        set_beta2(parts.optimizer, min(*configured, parts.escalation.beta2))


def _load_stateful(part: Stateful | None, state: dict[str, Any] | None) -> None:
    if part is not None and state is not None:
        part.load_state_dict(state)


def _restore_epoch_file(
    path: str, parts: RunParts, *, runtime: Runtime, steps_per_epoch: int, samples_per_step: int
) -> None:
    """Collective: all ranks."""
    checkpoint = agree_on_epoch_file(path, parts.model, runtime=runtime)  # collective: all ranks
    send_weights(checkpoint.weights, parts.model, runtime=runtime)  # collective: all ranks
    if checkpoint.optimizer is not None:
        share = partial(send, runtime=runtime)
        saved, names = checkpoint.optimizer, checkpoint.names
        load_foreign_optimizer(parts.optimizer, parts.model, saved, weights=names, path=path, share=share)
    else:
        logger.warning("%s holds weights only: the optimizer starts afresh.", path)
    if parts.scaler is not None and checkpoint.scaler is not None:
        parts.scaler.load_state_dict(dict(checkpoint.scaler))
    parts.loader.start_at_epoch(checkpoint.epoch)
    parts.state.step = checkpoint.epoch * steps_per_epoch
    parts.state.samples_seen = parts.state.step * samples_per_step


def _restore_rng(states: Mapping[str, Tensor], *, step: int, saved_world_size: int, runtime: Runtime) -> None:
    if saved_world_size != runtime.world_size:
        _seed_rng(step, rank=runtime.rank)
        return
    torch.set_rng_state(states[f"{runtime.rank}//cpu"].cpu())
    if runtime.device.type == "cuda" and f"{runtime.rank}//cuda" in states:
        torch.cuda.set_rng_state(states[f"{runtime.rank}//cuda"].cpu(), runtime.device)


def _seed_rng(step: int, *, rank: int) -> None:
    """In another world no rank's generator has a past: each begins with one of its own."""
    torch.manual_seed(mix(step, rank) >> 1)
