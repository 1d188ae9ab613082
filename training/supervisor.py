"""Watches over a run between its steps: verdicts, signals, clocks and checksums become decisions of all ranks.

    TrainStep -> vitals, equal on all ranks -> read two steps later -> Escalation -> skip, damp, rewind, stop
    signal or clock of one rank -> the vitals of its next step -> all ranks save, or stop, after the same step
    every K steps, and before every save: are the ranks' parameters still equal?

Nothing here waits for the device, but for what a step computed two steps ago. Collectives only where all ranks have
read the same reason for one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.checkpoint.manifest import DamagedCheckpoint
from training.checkpoint.run_state import RunParts
from training.checkpoint.saver import Saver
from training.config import ResilienceConfig
from training.distributed.collectives import all_reduce_max, broadcast_object, gather_objects
from training.distributed.runtime import Runtime
from training.observability.events import EventLog
from training.observability.reporter import Reporter
from training.observability.stragglers import Straggler
from training.observability.telemetry import HIGH_SHARE
from training.optim.optimizer import set_beta2
from training.resilience.delayed import LAG, DelayedVitals
from training.resilience.escalation import Action, Escalation, Rewind, Skipped, Stop
from training.resilience.exit_codes import DO_NOT_REQUEUE, NODE_SUSPECTED
from training.resilience.guard import STATISTICS, VITALS, Request, StepGuard, Vitals
from training.resilience.preemption import Preemption
from training.resilience.replicas import checksum_names, differing_ranks, differing_tensors, replica_checksum
from training.resilience.sentinel import write_sentinel
from training.resilience.watchdog import Watchdog

logger = logging.getLogger(__name__)

_SHOWN_SAMPLES = 16
"""Of a step in an event; ``clipyard data trace`` shows all of them."""
_ASKS_EVERY = 10
"""Steps without vitals between two questions whether a signal was received."""


class RunStopped(SystemExit):
    """The run ends for a reason that its exit code tells; raised on all ranks."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Decision(NamedTuple):
    """What all ranks do after a step."""

    save: bool = False
    stop: bool = False
    """A signal was received: save, and end in order."""
    rewind_from: int | None = None
    """The weights go back to before this step: the onset of a spike, or where the ranks may have parted."""
    settle: bool = False
    """Statistics are gathered anew after it: the last rewind did not help, so perhaps the data has changed."""
    diverged: bool = False
    """The ranks differ: going on as they are is no choice."""


class Tally(NamedTuple):
    """What is counted through all phases of a process."""

    divergences: int
    """How often the ranks differed."""
    dropped_saves: int


@dataclass(frozen=True)
class Watch:
    """What a run is watched with, beside its model and data."""

    guard: StepGuard
    escalation: Escalation
    preemption: Preemption
    watchdog: Watchdog
    events: EventLog | None
    """On rank 0 of a run with a directory."""


class Supervisor:
    """Takes every step's vitals and says what follows. All ranks call every method, in step."""

    def __init__(
        self,
        watch: Watch,
        *,
        config: ResilienceConfig,
        parts: RunParts,
        saver: Saver | None,
        reporter: Reporter | None,
        root: Path | None,
        runtime: Runtime,
        beta2: float | None,
    ) -> None:
        """
        Args:
            root: the run's directory; None with ``--logs none``.
            beta2: as configured; None for optimizers without.
        """
        self._config = config
        self._watch = watch
        self._parts = parts
        self._saver = saver
        self._reporter = reporter
        self._root = root
        self._runtime = runtime
        self._vitals = DelayedVitals()
        self._samples: deque[tuple[int, list[Tensor]]] = deque(maxlen=LAG + 1)
        self._beta2 = beta2
        self._saved: list[int] = [] if saver is None else saver.untagged()
        """Checkpoints that are neither known to be good nor given up."""
        self._equal_until = parts.state.step
        """Up to this step the ranks' parameters are known to have been equal."""
        self._divergences = 0
        self._damp_optimizer()  # as the guard was left, or is not to act any more
        if self.lr_factor != 1:
            logger.warning("The learning rate is still multiplied with %.3g: see events.jsonl.", self.lr_factor)

    @property
    def lr_factor(self) -> float:
        """What the scheduled learning rate is multiplied with, while a run is damped."""
        return self._watch.escalation.lr_factor if self._watch.guard.acts else 1.0

    def tally(self) -> Tally:
        """What the next phase goes on counting."""
        return Tally(self._divergences, 0 if self._saver is None else self._saver.dropped)

    def go_on_from(self, tally: Tally) -> None:
        """Another phase of the same process has begun, from the checkpoint that the one before has just saved."""
        self._divergences = tally.divergences
        if self._saver is not None:
            self._saver.dropped = tally.dropped_saves
            self._saver.note_saved(self._parts.state.step)

    def asked_to_stop(self) -> bool:
        """Whether any rank received a signal, where no step's vitals carry the question. Collective: all ranks."""
        return self._watch.preemption.agreed(gather_objects) is not None  # collective: all ranks

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around what may take longer than a step."""
        return self._watch.watchdog.phase(name)

    def beat(self, step: int) -> None:
        """``step`` batches are consumed: this rank makes progress."""
        self._watch.watchdog.beat(step)

    def after_step(self, step: int, vitals: Tensor | None, samples: Sequence[Tensor], *, saves: bool) -> Decision:
        """Notes what ``step`` measured, and decides on what is known of the steps before it.

        Args:
            vitals: of the step, on the device.
            samples: of each micro-batch of this rank: int64 [B, slot, raw index, ...].
            saves: whether a checkpoint is due: only what is equal on all ranks is saved.

        Raises:
            RunStopped: going on, and starting again, would not help (93), or not on these nodes (95); on all ranks.
        """
        self.beat(step + 1)
        self._samples.append((step, list(samples)))
        if vitals is not None:
            self._vitals.push(step, vitals)
        if self._watch.preemption.requested is not None:
            self._watch.guard.request(Request.STOP)
        if self._saver is not None:
            self._note_saves(self._saver)
            if self._saver.request_due_by_clock():
                self._watch.guard.request(Request.SAVE)
        decision = self._read(Decision(), self._vitals.ready())
        saves |= decision.save or decision.stop
        every = self._config.checksum_every_n_steps
        # First of all: ranks that differ may know different things about the steps that are still to be read.
        if every > 0 and ((step + 1) % every == 0 or saves) and (onset := self._find_divergence()) is not None:
            return decision._replace(rewind_from=onset, diverged=True)
        if saves:
            # Saving waits for the device anyway, and what is saved must not owe a verdict. Host sync.
            decision = self._read(decision, self._vitals.drain())
        return decision

    def leaves_out(self, step: int) -> bool:
        """Whether the data of ``step`` is not trained on: after a rewind, what may have caused the spike is not met."""
        return self._watch.guard.acts and step < self._watch.escalation.resume_step

    def after_left_out(self, step: int) -> Decision:
        """The same as ``after_step`` for a step that was left out, which has no vitals for signals to travel with."""
        self.beat(step + 1)
        if step + 1 >= self._watch.escalation.resume_step:
            self._note(step, "data left out", through=step)
        asks = (step + 1) % _ASKS_EVERY == 0
        return Decision(stop=asks and self.asked_to_stop())  # collective: all ranks

    def skipped(self, vitals: Tensor | None) -> Tensor | None:
        """0-D on the device: above 0 if the step changed nothing because it was bad."""
        return vitals[VITALS.index("bad")] if vitals is not None and self._watch.guard.acts else None

    def note_telemetry(self, step: int, measured: Mapping[str, float]) -> None:
        """Large updates announce a spike: they damp the run before there is one. Collective: all ranks."""
        if not self._watch.guard.acts:
            return
        share = torch.tensor([measured.get(HIGH_SHARE, 0.0)], device=self._runtime.device)
        # Equal on all ranks unless one of them is broken: and then they must not decide differently.
        share = all_reduce_max(share)  # collective: all ranks
        for action in self._watch.escalation.observe_update_rms(step, share.item()):  # host sync
            self._carry_out(action, None)

    def note_straggler(self, step: int, straggler: Straggler) -> None:
        """Says which rank all others wait for; the run goes on."""
        logger.warning("Step %d: %s.", step, straggler)
        self._note(step, "straggler", **asdict(straggler))

    def rewind(self, decision: Decision, *, epoch: int) -> None:
        """Takes the weights back, saves them where the run stands, and goes on with later data. Collective: all ranks.

        Saved at once: a run that is killed from here on does not meet the same spike again. Where there is nothing to
        go back to, it goes on with what it has.

        Raises:
            RunStopped: none of the checkpoints can be used (93); the ranks differ and there is none from before, or
                it is not the first time (95).
        """
        step, onset = self._parts.state.step, decision.rewind_from
        assert onset is not None
        self._divergences += decision.diverged
        with self.phase("rewind"):
            possible = self._saver is not None and broadcast_object(self._saver.can_rewind(onset))  # collective: all
            if decision.diverged and (not possible or self._divergences > self._config.guard_max_rewinds):
                self._stop(step, NODE_SUSPECTED, f"step {step}: the ranks differ, and cannot be taken back once more")
            if self._saver is None or not possible:
                logger.warning("There is no checkpoint from before step %d to go back to: going on.", onset)
                self._note(step, "rewind impossible", onset=onset)
                self._watch.guard.settle()
                self._watch.escalation.go_on(step)
                return
            try:
                to_step = self._saver.rewind(onset)  # collective: all ranks
            except DamagedCheckpoint as damage:
                self._stop(step, DO_NOT_REQUEUE, f"step {step}: {damage}")
        if decision.settle:
            self._watch.guard.settle()
        self._vitals.drain()  # of weights that are gone
        self._saved = [saved for saved in self._saved if saved <= onset]
        self._equal_until = step
        logger.warning("Rewound from step %d to the weights of step %d.", step, to_step)
        self._note(step, "rewound", onset=onset, to_step=to_step)
        with self.phase("save"):
            self._saver.save_now_and_wait(epoch=epoch, reason="rewind")

    def end_by_signal(self, *, epoch: int) -> None:
        """Saves, and tells the batch script to go on later. Collective: all ranks."""
        step = self._parts.state.step
        signal_name = self._watch.preemption.agreed(gather_objects) or "a signal"  # collective: all ranks
        logger.warning("%s: saving after step %d, and ending.", signal_name, step)
        with self.phase("save"):
            saved = self._saver is None or self._saver.save_now_and_wait(epoch=epoch, reason="signal")
        if not saved:
            raise RuntimeError(f"{signal_name} received, and step {step} could not be saved: see the errors above.")
        self._note(step, "stopped by a signal", signal=signal_name)
        if self._runtime.is_main and self._root is not None:
            write_sentinel(self._root, signal_name=signal_name, step=step)

    def end_phase(self, *, epoch: int) -> None:
        """Saves what the next phase goes on from, and waits for it. Collective: all ranks.

        Raises:
            RuntimeError: it could not be saved.
        """
        step = self._parts.state.step
        with self.phase("save"):
            saved = self._saver is not None and self._saver.save_now_and_wait(epoch=epoch, reason="phase")
        if not saved:
            raise RuntimeError(
                f"The next phase cannot begin: step {step} could not be saved, see the errors above. Repair the disk, "
                "or free space, and start again (--resume latest)."
            )
        self.end()

    def end(self) -> None:
        """Waits for the last save. Collective: all ranks."""
        if self._saver is not None:
            with self.phase("save"):
                self._saver.finish()
            self._note_saves(self._saver)

    def _read(self, decision: Decision, arrived: Sequence[tuple[int, Vitals]]) -> Decision:
        for step, vitals in arrived:
            decision = self._decide(decision, step, vitals)
        return decision

    def _decide(self, decision: Decision, step: int, vitals: Vitals) -> Decision:
        decision = decision._replace(
            save=decision.save or vitals.save_requested > 0, stop=decision.stop or vitals.stop_requested > 0
        )
        for action in self._watch.escalation.observe(step, vitals) if self._watch.guard.acts else ():
            self._carry_out(action, vitals)
            if isinstance(action, Rewind):
                decision = decision._replace(rewind_from=action.onset, settle=action.settle)
        if vitals.overflow:
            self._note(step, "overflow", loss=vitals.loss)
        return decision

    def _carry_out(self, action: Action, vitals: Vitals | None) -> None:
        details: dict[str, Any] = {name: value for name, value in vars(action).items() if name != "step"}
        if isinstance(action, Skipped) and vitals is not None:
            logger.warning("Step %d is skipped on all ranks: %s.", action.step, action.reason)
            details |= {"loss": vitals.loss, "grad_norm": vitals.grad_norm}
            details["samples"] = self._samples_of(action.step, vitals)  # collective: all ranks, of a bad step
        elif isinstance(action, Stop):
            self._stop(action.step, DO_NOT_REQUEUE, action.reason)
        else:
            logger.warning("%s at step %d: %s.", type(action).__name__, action.step, details)
        self._note(action.step, type(action).__name__.lower(), **details)
        self._damp_optimizer()

    def _damp_optimizer(self) -> None:
        beta2 = self._watch.escalation.beta2 if self._watch.guard.acts else None
        if self._beta2 is not None:
            set_beta2(self._parts.optimizer, self._beta2 if beta2 is None else min(self._beta2, beta2))

    def _samples_of(self, step: int, vitals: Vitals) -> list[dict[str, Any]]:
        """The first samples of a step: of the one rank that found something wrong, or a few of many ranks."""
        batches = next((batches for known, batches in self._samples if known == step), [])
        rank, source = self._runtime.rank, self._parts.loader.source
        shown = _SHOWN_SAMPLES if vitals.flagged_rank == rank else 0
        if vitals.flagged_rank == -1 and rank < _SHOWN_SAMPLES:
            shown = max(1, _SHOWN_SAMPLES // self._runtime.world_size)
        rows = torch.cat(batches)[:shown, :2].tolist() if batches else []
        mine = [{"rank": rank, "shard": source.shard_name(slot), "index": index} for slot, index in rows]
        return [sample for samples in gather_objects(mine) for sample in samples]  # collective: all ranks

    def _find_divergence(self) -> int | None:
        """The last step at which all ranks were equal, if they are not now. Collective: all ranks; host sync.

        Raises:
            RunStopped: they are not, and ``--on-divergence`` says to stop (95).
        """
        if self._runtime.world_size == 1:
            return None
        model, optimizer = self._parts.model, self._parts.optimizer
        own = torch.cat([replica_checksum(model, optimizer), self._watch.guard.statistics()])
        checksums = gather_objects(own.tolist())  # collective: all ranks, host sync
        ranks = differing_ranks(checksums)
        step = self._parts.state.step
        if not ranks:
            self._equal_until = step
            return None
        tensors = differing_tensors(checksums, [*checksum_names(model, optimizer), *STATISTICS])
        since = self._equal_until
        message = (
            f"step {step}: the parameters of rank {', '.join(map(str, ranks))} differ from the others' in "
            f"{len(tensors)} tensors (first {tensors[0]}), after step {since} at the earliest: memory or a device of "
            "its node is broken"
        )
        self._note(step, "replicas differ", ranks=ranks, tensors=tensors[:_SHOWN_SAMPLES], equal_until=since)
        if self._saver is not None:
            self._saver.tag_suspect(since + 1)
        if self._config.on_divergence == "stop":
            self._stop(step, NODE_SUSPECTED, message)
        logger.error("%s.", message)
        return since + 1

    def _stop(self, step: int, code: int, message: str) -> None:
        self._note(step, "stopped", code=code, reason=message)
        logger.error("%s.", message)
        if self._saver is not None:
            with self.phase("save"), suppress(RuntimeError):  # what is being written may be what is gone back to
                self._saver.finish()
        raise RunStopped(code, message)

    def _note_saves(self, saver: Saver) -> None:
        """Reports finished saves, and tags as good what training went on well from."""
        for saved in saver.poll():
            self._saved.append(saved.step)
            if self._reporter is not None:
                numbers = {
                    "stall_ms": saved.stall_ms,
                    "write_s": saved.write_s,
                    "gigabytes": saved.bytes / 1e9,
                    "dropped": saver.dropped,
                }
                self._reporter.scalars(saved.step, {f"checkpoint/{name}": value for name, value in numbers.items()})
        settled = [step for step in self._saved if step <= self._watch.escalation.good_through()]
        for step in settled:
            self._saved.remove(step)
            if self._watch.escalation.is_good(step):
                saver.tag_good(step)

    def _note(self, step: int, event: str, **details: Any) -> None:
        if self._watch.events is not None:
            self._watch.events.write(step, event, **details)
