"""CLIP's byte-pair tokenizer: ids equal to open_clip's SimpleTokenizer, several times faster, in bounded time.

    text -> clean (ftfy, HTML entities, white space, case) -> chunks between white space -> words -> byte pairs -> ids

Chunks and words are looked up in bounded caches, so ordinary captions rarely reach the merging of byte pairs. Long
words are merged by a heap: one of 64 KiB takes a fraction of a second instead of minutes.
"""

from __future__ import annotations

import gzip
import heapq
import html
import string
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import regex
import torch
from torch import Tensor

CLEAN_MODES = ("lower", "whitespace", "canonicalize")

_SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = regex.compile(
    "|".join(_SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_NUM_MERGES = 49152 - 256 - 2
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MAX_CACHED = 1 << 16
"""Entries of each of the two caches, about 10 MB when full: a loader worker runs for weeks."""
_MAX_CACHED_LENGTH = 64
"""Characters of a cached chunk; longer ones hardly come twice."""
_SHORT_WORD = 24
"""Bytes up to which looking at all pairs again is faster than a heap."""


class Vocabulary(NamedTuple):
    """Token ids of byte pairs."""

    of_byte: tuple[int, ...]
    """Ids of the 256 bytes; 256 more for the same byte at the end of a word."""
    merges: dict[tuple[int, int], int]
    """(left, right) -> merged. Earlier merges have smaller ids, so an id is also its merge's rank."""
    start: int
    end: int


class ClipBpe:
    """Texts to int64 ids [n, context_length]: start, tokens, end, zeros; long texts are cut, the end token kept."""

    def __init__(self, *, context_length: int, clean: str = "lower") -> None:
        self.context_length = context_length
        self._clean = _CLEAN[clean]
        self._clean_plain = _CLEAN_PLAIN[clean]
        self._vocabulary = load_vocabulary()
        self._chunks: dict[str, tuple[int, ...]] = {}
        self._words: dict[str, tuple[int, ...]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encodes a list of texts."""
        _, _, start, end = self._vocabulary
        ids = np.zeros((len(texts), self.context_length), dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            tokens = [start, *self.encode(text, limit=self.context_length), end]
            if len(tokens) > self.context_length:
                tokens = tokens[: self.context_length]
                tokens[-1] = end
            row[: len(tokens)] = tokens
        return torch.from_numpy(ids)

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """The text's ids without start and end; at least the first ``limit`` of them."""
        # What ftfy and html.unescape leave alone for certain: printable ASCII without an entity. Most captions.
        plain = text.isascii() and text.isprintable() and "&" not in text
        tokens: list[int] = []
        for chunk in (self._clean_plain if plain else self._clean)(text).split():
            tokens += self._chunks.get(chunk) or self._encode_chunk(chunk, limit=limit)
            if limit is not None and len(tokens) >= limit:
                break
        return tokens

    def _encode_chunk(self, chunk: str, *, limit: int | None) -> tuple[int, ...]:
        """Ids of text without white space: no word reaches beyond it."""
        tokens: list[int] = []
        for match in _WORDS.finditer(chunk):
            word = match.group()
            tokens += self._words.get(word) or self._encode_word(word)
            if limit is not None and len(tokens) >= limit and len(chunk) > _MAX_CACHED_LENGTH:
                return tuple(tokens)  # not the whole chunk, which is too long to be kept anyway
        return _remember(self._chunks, chunk, tuple(tokens))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        of_byte, merges, start, end = self._vocabulary
        if word in _SPECIAL:  # in lower case only, although the pattern takes every case
            return (start,) if word == _SPECIAL[0] else (end,)
        data = word.encode("utf-8")
        tokens = [of_byte[byte] for byte in data]
        tokens[-1] = of_byte[256 + data[-1]]
        merge = merge_short if len(tokens) <= _SHORT_WORD else merge_long
        return _remember(self._words, word, tuple(merge(tokens, merges)))


def _remember(known: dict[str, tuple[int, ...]], text: str, tokens: tuple[int, ...]) -> tuple[int, ...]:
    if len(text) <= _MAX_CACHED_LENGTH:
        if len(known) >= _MAX_CACHED:
            known.clear()
        known[text] = tokens
    return tokens


def merge_short(tokens: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """Merges the best pair everywhere, again and again: quadratic in the length, with a small constant."""
    while len(tokens) > 1:
        candidates = [merged for pair in pairwise(tokens) if (merged := merges.get(pair)) is not None]
        if not candidates:
            break
        best = min(candidates)
        joined: list[int] = []
        index = 0
        while index < len(tokens):
            if index + 1 < len(tokens) and merges.get((tokens[index], tokens[index + 1])) == best:
                joined.append(best)
                index += 2
            else:
                joined.append(tokens[index])
                index += 1
        tokens = joined
    return tokens


def merge_long(tokens: list[int], merges: dict[tuple[int, int], int]) -> list[int]:
    """The same result in n log n. A merge only ever enables later ones, so best-first, leftmost-first is the order.

    The tokens are a linked list in place: a token is at the position of its first byte, -1 marks what was merged away.
    """
    count = len(tokens)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    heap = [(merges[pair], place) for place, pair in enumerate(pairwise(tokens)) if pair in merges]
    heapq.heapify(heap)
    while heap:
        merged, left = heapq.heappop(heap)
        right = after[left]
        if right >= count or merges.get((tokens[left], tokens[right])) != merged:
            continue  # one of the two was merged since this pair was noted
        tokens[left], tokens[right] = merged, -1
        after[left] = following = after[right]
        if following < count:
            before[following] = left
            if (new := merges.get((merged, tokens[following]))) is not None:
                heapq.heappush(heap, (new, left))
        previous = before[left]
        if previous >= 0 and (new := merges.get((tokens[previous], merged))) is not None:
            heapq.heappush(heap, (new, previous))
    return [token for token in tokens if token >= 0]


@cache
def load_vocabulary() -> Vocabulary:
    """CLIP's vocabulary, from open_clip's package directory: found, not imported, which would take seconds.

    Raises:
        RuntimeError: the package or its file is missing.
    """
    spec = find_spec("open_clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise RuntimeError(f"CLIP's vocabulary is missing ({path}): install open_clip_torch again.")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
    order = _byte_order()
    ids = {chr(symbol): index for index, symbol in enumerate(order.values())}
    ids |= {f"{symbol}</w>": 256 + index for symbol, index in ids.items()}
    merges: dict[tuple[int, int], int] = {}
    for token, line in enumerate(lines, start=512):
        left, right = line.split()
        merges[ids[left], ids[right]] = token
        ids[left + right] = token
    of_byte = [0] * 512
    for index, byte in enumerate(order):
        of_byte[byte], of_byte[256 + byte] = index, 256 + index
    return Vocabulary(tuple(of_byte), merges, start=512 + len(lines), end=513 + len(lines))


def _byte_order() -> dict[int, int]:
    """Byte -> code point of its symbol in the file, in the order of the ids: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + index for index, byte in enumerate(others)}


def _repair(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _lower(text: str) -> str:
    return " ".join(_repair(text).split()).lower()


def _canonicalize_plain(text: str) -> str:
    return text.replace("_", " ").translate(_NO_PUNCTUATION).lower()


_CLEAN: dict[str, Callable[[str], str]] = {
    "lower": _lower,
    "whitespace": _repair,
    "canonicalize": lambda text: _canonicalize_plain(_repair(text)),
}
"""As open_clip's functions; joining words by single spaces is left out where they are split again at once."""
_CLEAN_PLAIN: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "whitespace": str,
    "canonicalize": _canonicalize_plain,
}
