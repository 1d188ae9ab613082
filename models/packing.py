"""Packs captions: one batch as one row of its tokens, without the padding. On the host, before the batch is copied.

    texts [B, L]    s a b e 0 0 0 0        tokens [T]   s a b e s c e s d f g e 0 0
                    s c e 0 0 0 0 0   ->   positions    0 1 2 3 0 1 2 0 1 2 3 4 0 1
                    s d f g e 0 0 0        offsets      0       4     7         12  14
                                                                                 filler

What stands behind the pooled end token cannot reach it through causal attention, so it is left out, and the features
are those of the padded batch. T is rounded up, so that programs and memory see few different shapes: filler captions
take up the difference, and their features are dropped.

Shapes: B rank batch, L padded length, C captions with filler, T tokens of all captions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.packed_attention import Packing

_Integers = NDArray[np.int64]
_GROUPS_END_AT = (0.25, 0.5, 0.7, 0.83, 0.91, 0.96, 0.985, 1.0)
"""Shares of the captions, by length, at which groups of about one length end: smaller ones where lengths spread. With
web alt-texts a sixth more attention slots than tokens."""
_SIZES = 256
"""T is a multiple of a 256th of the padded size, and of this at most: 1 % more tokens, half a dozen sizes."""


class PackedTexts(NamedTuple):
    """A batch of captions as ``Clip.encode_text`` takes it in place of int64 [B, L]."""

    tokens: Tensor
    """int64 [T]: token ids."""
    positions: Tensor
    """int64 [T]: place of each token in its caption."""
    packing: Packing
    lengths: _Integers
    """[B], on the host: tokens of each caption, without filler. Not a tensor: wrappers would move it to the device."""
    context_length: int
    """L: what the batch was padded to."""

    @property
    def num_texts(self) -> int:
        """B."""
        return len(self.lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTexts:
        """The same batch on a device."""
        return _moved(self, torch.device(device), non_blocking)  # type: ignore[no-any-return]

    def first(self, count: int) -> Tensor:
        """The first captions padded with zeros to the longest of them: int64 [count, longest]. No host sync."""
        lengths = self.lengths[:count].tolist()
        return pad_sequence(list(self.tokens[: sum(lengths)].split(lengths)), batch_first=True)


def pack_texts(texts: Tensor, *, eos_id: int | None = None, multiple: int | None = None) -> PackedTexts:
    """int64 [B, L] on the host -> the same captions in one row; shares no memory with ``texts``.

    Args:
        eos_id: the token whose first occurrence is pooled (``pool_type`` eos); None: the highest id (argmax).
        multiple: of which T is one; None chooses. Not reached where the captions together have no such room.
    """
    ids = texts.numpy()
    context_length = ids.shape[1]
    # As the towers pool: the first of several, and the first token if there is none.
    lengths = (ids if eos_id is None else ids == eos_id).argmax(axis=1).astype(np.int64) + 1  # [B]
    fillers = _fillers(int(lengths.sum()), context_length, multiple or token_multiple(*ids.shape))
    real = ids[np.arange(context_length) < lengths[:, None]]  # row after row: [B, L] -> [sum of lengths]
    tokens = np.concatenate([real, np.zeros(fillers.sum(), dtype=np.int64)])  # [T]
    packing, positions = _lay_out(np.concatenate([lengths, fillers]), context_length)
    return PackedTexts(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        packing=packing,
        lengths=lengths,
        context_length=context_length,
    )


def token_multiple(batch: int, context_length: int) -> int:
    """The power of two next to a 256th of the padded size: 896 captions of 77 come in multiples of 256."""
    return 1 << max(0, min(_SIZES, batch * context_length // _SIZES).bit_length() - 1)


def _fillers(total: int, context_length: int, multiple: int) -> _Integers:
    """Lengths of the filler captions: as many for every batch, none of them empty, none longer than the context."""
    if multiple == 1 or context_length == 1:
        return np.zeros(0, dtype=np.int64)
    count = -(-(multiple - 1) // (context_length - 1))
    missing = count + -(total + count) % multiple
    return np.array([missing // count + (place < missing % count) for place in range(count)], dtype=np.int64)


def _lay_out(lengths: _Integers, context_length: int) -> tuple[Packing, _Integers]:
    """The packing of captions of these lengths, and the position of every token in its caption."""
    count = len(lengths)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])  # [C+1]
    positions = np.arange(offsets[-1]) - offsets[:-1].repeat(lengths)  # [T]
    order = lengths.argsort(kind="stable")
    rows = np.empty(count, dtype=np.int64)
    rows[order] = np.arange(count)
    # Of the same sizes in every batch: then only their widths differ, and one compiled program serves all batches.
    bounds = sorted({round(count * share) for share in _GROUPS_END_AT} - {0, count})
    groups, first_slots, slots = [], [], 0
    for captions in np.split(order, bounds):
        # Two at least: torch.compile makes another program for a dimension of one.
        longest = max(2, lengths[captions].max())
        places = np.minimum(np.arange(longest), lengths[captions, None] - 1)  # [n, W]
        groups.append(torch.from_numpy(offsets[captions, None] + places))
        first_slots.append(slots + longest * np.arange(len(captions)))
        slots += longest * len(captions)
    slot_of_first = np.concatenate(first_slots)[rows]  # [C]
    packing = Packing(
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        ends=torch.from_numpy(offsets[1:] - 1),
        places=torch.arange(count + 1, dtype=torch.int32),
        longest=min(context_length, -(-int(lengths.max()) // 128) * 128),
        groups=tuple(groups),
        slots=torch.from_numpy(slot_of_first.repeat(lengths) + positions),
        order=torch.from_numpy(order),
        rows=torch.from_numpy(rows),
    )
    return packing, positions


def _moved(value: Any, device: torch.device, non_blocking: bool) -> Any:
    """Tensors on the device, at any depth of tuples; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple):
        moved = [_moved(item, device, non_blocking) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
