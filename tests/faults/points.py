"""Where faults strike: the one table of names of the training code. A name that is gone makes every fault test fail.

A function is changed in place, so that it does not matter who holds it, or since when. A method is replaced in its
class.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

POINTS = {
    # the loop
    "train": "training.train:train",
    "batch": "training.train:_next_micro_batches",
    "step": "training.train_step:TrainStep.__call__",
    "update": "training.optim.update:Update.__call__",
    "judge": "training.resilience.guard:StepGuard.judge",
    "sum": "training.distributed.collectives:all_reduce_sum",
    "evaluate": "training.assembly:evaluate_epoch",
    "request": "training.resilience.guard:StepGuard.request",
    "save_and_wait": "training.checkpoint.saver:Saver.save_now_and_wait",
    "watch": "training.resilience.watchdog:Watchdog._watch",
    # a save, in order
    "background": "training.checkpoint.background:BackgroundWriter.start",
    "capture": "training.checkpoint.capture:capture",
    "new_staging": "training.checkpoint.checkpointer:Checkpointer.new_staging",
    "write_share": "training.checkpoint.checkpointer:Checkpointer.write_share",
    "write_file": "training.checkpoint.tensor_file:write_tensors",
    "write_receipt": "training.checkpoint.checkpointer:_write_receipt",
    "receipts": "training.checkpoint.checkpointer:Checkpointer._collect_receipts",
    "write_manifest": "training.checkpoint.manifest:write_manifest",
    "read_back": "training.checkpoint.checkpointer:Checkpointer._check_read_back",
    "rename": "training.checkpoint.checkpointer:Checkpointer._rename",
    "hint": "training.checkpoint.checkpointer:Checkpointer._write_hint",
    "retention": "training.checkpoint.checkpointer:Checkpointer.remove_old",
    "choose_writers": "training.checkpoint.parts:choose_writers",
    "share_is_finite": "training.checkpoint.checkpointer:_check_finite",
    "abandon": "training.checkpoint.checkpointer:Checkpointer.abandon",
    "note_failure": "training.checkpoint.saver:Saver._note_failure",
    "export": "training.checkpoint.export:write_epoch_file",
    # a resume, in order
    "list_steps": "training.checkpoint.checkpointer:Checkpointer.steps",
    "candidates": "training.checkpoint.checkpointer:Checkpointer.candidates",
    "plan": "training.checkpoint.step_loading:agree_on_plan",
    "open_file": "training.checkpoint.tensor_file:_open",
    "check_size": "training.checkpoint.manifest:check_size",
    "check_content": "training.checkpoint.manifest:check_content",
    "is_finite": "training.checkpoint.checkpointer:is_finite",
    "agree": "training.checkpoint.step_loading:TensorStream.agree",
    "is_equal": "training.checkpoint.step_loading:check_equal",
    "check_fit": "training.checkpoint.run_state:_check_fit",
    "compare_config": "training.checkpoint.config_change:compare",
    "torch_load": "torch.serialization:load",
    "load": "training.checkpoint.run_state:_load",
    "load_position": "training.data.loader:TrainLoader.load_position",
    "rewind": "training.checkpoint.run_state:rewind_before",
    # who owns the run
    "fence": "training.resilience.lease:Lease.check",
    "claim": "training.resilience.lease:claim_lease",
    "is_ended": "training.resilience.lease:_check_ended",
    "crashed_starts": "training.resilience.progress:crashed_starts",
    # the loader
    "new_workers": "training.data.worker_pool:WorkerPool.__init__",
    "retry": "training.data.storage_errors:Patience.failed",
    # the mirror
    "upload": "training.checkpoint.mirror:Mirror._upload",
    "upload_step": "training.checkpoint.mirror:Mirror._upload_step",
}

Wrapper = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def find(name: str) -> tuple[Any, str, Callable[..., Any]]:
    """(owner, attribute, function) of a point.

    Raises:
        LookupError: the training code has no such function any more.
    """
    module_name, _, path = POINTS[name].partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, attribute = path.split(".")
    for part in classes:
        owner = getattr(owner, part, None)
    function = getattr(owner, attribute, None)
    if not callable(function):
        raise LookupError(f"the point {name!r} is {POINTS[name]}, which is gone: correct the table in {__file__}")
    return owner, attribute, function


def wrap(name: str, wrapper: Wrapper) -> None:
    """From now on calls of a point's function are calls of ``wrapper(function, args, kwargs)``."""
    owner, attribute, function = find(name)
    if isinstance(owner, type):
        setattr(owner, attribute, _delegating(function, wrapper))
    elif isinstance(function, FunctionType) and not function.__code__.co_freevars:
        _change_in_place(function, name, wrapper)
    else:  # behind a decorator
        replacement = _delegating(function, wrapper)
        for module in [module for key, module in sys.modules.items() if key.split(".")[0] in ("training", "models")]:
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, replacement)


def _delegating(function: Callable[..., Any], wrapper: Wrapper) -> Callable[..., Any]:
    @functools.wraps(function)
    def delegate(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, args, kwargs)

    return delegate


def _change_in_place(function: FunctionType, name: str, wrapper: Wrapper) -> None:
    original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__ = function.__kwdefaults__
    handle = f"_at_{name}"
    function.__globals__[handle] = lambda *args, **kwargs: wrapper(original, args, kwargs)
    source = f"def {function.__name__}(*args, **kwargs):\n    return {handle}(*args, **kwargs)\n"
    scope: dict[str, Any] = {}
    exec(source, scope)
    function.__code__ = scope[function.__name__].__code__
    function.__defaults__, function.__kwdefaults__ = None, None
