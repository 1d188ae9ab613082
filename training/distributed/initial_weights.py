"""Gives every rank its part of weights that one rank has made, tensor by tensor.

With FSDP a model may be larger than a device, and eight copies of it larger than a node. So all ranks but one build it
without memory (on torch's ``meta`` device), and none ever holds more than its own part and one whole tensor beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from training.distributed.collectives import broadcast_object, broadcast_tensor, rank
from training.distributed.sharding import local_parameters, placements


def send_weights(model: nn.Module, source: nn.Module | None, *, device: torch.device) -> None:
    """Fills parameters and buffers with those of rank 0's ``source``. Collective: all ranks; host sync.

    Args:
        model: registered with ``register_sharding``, on its device, with any values.
        source: the whole model, on the CPU; None on ranks other than 0.
        device: that the tensors travel on.

    Raises:
        RuntimeError: rank 0's model has other tensors than this rank's.
    """
    held = {**local_parameters(model), **dict(model.named_buffers())}
    given = {} if source is None else {**dict(source.named_parameters()), **dict(source.named_buffers())}
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in given.items()}
    kinds = broadcast_object(kinds)  # collective: all ranks, host sync
    places = placements(model)
    own = {
        name: (places[name].full_shape if name in places else tuple(value.shape), value.dtype)
        for name, value in held.items()
    }
    if own != kinds:
        name = next(iter(dict([*own.items() ^ kinds.items()])))
        raise RuntimeError(
            f"rank {rank()} has built another model than rank 0: {name} is {own.get(name, 'missing')} here and "
            f"{kinds.get(name, 'missing')} there; install the same versions of clipyard, timm and transformers "
            "everywhere"
        )
    with torch.no_grad():
        for name, (shape, dtype) in kinds.items():
            whole = (
                given[name].detach().to(device).contiguous()
                if given
                else torch.empty(shape, dtype=dtype, device=device)
            )
            broadcast_tensor(whole, 0)  # collective: all ranks
            if name in places:
                start, rows = places[name].start, places[name].rows
                whole = whole[start : start + rows]
            held[name].copy_(whole)


def check_no_meta_tensors(model: nn.Module) -> None:
    """Returns if every tensor that a forward pass may meet has memory.

    Raises:
        RuntimeError: a module keeps a tensor that is neither parameter nor buffer, and was built without memory.
    """
    for path, name, value in _plain_tensors(model):
        if value.is_meta:
            raise RuntimeError(
                f"{path} ({type(model.get_submodule(path)).__name__}) keeps {name!r}, a tensor that is neither "
                "parameter nor buffer, so that --fsdp cannot bring it to the ranks: train this model without --fsdp"
            )


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in model.named_modules():
        attributes: Mapping[str, object] = vars(module)
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                yield path, name, value
