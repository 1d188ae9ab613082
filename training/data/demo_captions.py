"""Say what is in a scene, the way web captions do: many lengths, many wordings, never untrue.

Every word that names an attribute is in one of the tables below and belongs to one value only, so a test (or a reader)
can check a caption against its scene word by word. Fillers around the facts are free of those words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from training.data.demo_scenes import Scene, Thing

# The first word of each list is the usual one; `_synonym` picks it about two times out of three.
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "brown": ("brown", "chestnut"),
    "black": ("black", "jet"),
    "white": ("white", "snowy"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "mid-sized"),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("flat", "clean"),
    "gradient": ("gradient", "shaded"),
    "stripes": ("pinstripe", "lined"),
    "dots": ("polka",),
    "checks": ("tiled", "gingham"),
    "noise": ("grainy", "noisy"),
    "clouds": ("cloudy", "misty"),
}
NEUTRAL_NOUNS = ("shape", "thing", "figure", "symbol")

TAGS = (
    "icon", "clipart", "sticker", "logo", "drawing", "picture", "illustration", "graphic", "emblem", "wallpaper",
    "print", "poster",
)  # fmt: skip
ALT_TAILS = (
    "free download", "stock image", "for kids", "in high quality", "| design shop", "- art gallery", "vector file",
    "with free shipping", "pack of images", "- my blog", "for web and print", "(updated)", "by the art club",
)  # fmt: skip
OPENINGS = ("a photo of", "a picture of", "an image of", "a drawing of", "this is", "here is", "you can see", "we see")
LONG_FILLERS = (
    "The whole scene was made by a computer, and nobody had to hold a brush.",
    "It would look nice on a birthday card or as a badge on a bag.",
    "Light comes from overhead, so everything has a soft shadow.",
    "Posted in the gallery for everyone who likes simple geometry.",
    "Download it for free and use it in your own project.",
    "There is nothing else to see here.",
    "My daughter likes this one best of all.",
)
MAX_PIECES = 50
"""Longest caption in words and punctuation marks; our words are almost all one token, so below 60 tokens."""


def caption(scene: Scene, rng: random.Random) -> str:
    """One caption; it may leave out attributes, things or the background, as captions on the web do."""
    kinds: list[Callable[[Scene, random.Random], str]] = [_alt_text, _sentence, _detailed, _story]
    write = rng.choices(kinds, weights=(0.34, 0.30, 0.26, 0.10))[0]
    return _tidy(write(scene, rng))


def captions(scene: Scene, rng: random.Random, *, count: int) -> list[str]:
    """Different captions of one scene that name all of its things: a retrieval set needs every one to identify it."""
    texts: list[str] = []
    kinds: list[Callable[[Scene, random.Random], str]] = [_full_sentence, _detailed, _detailed, _story]
    while len(texts) < count:
        text = _tidy(rng.choice(kinds)(scene, rng))
        if text not in texts:
            texts.append(text)
    return texts


def _alt_text(scene: Scene, rng: random.Random) -> str:
    """Keywords rather than a sentence: `Red Striped Star icon | design shop`."""
    if len(scene.things) == 1 or rng.random() < 0.25:
        words = _noun(rng.choice(scene.things), rng, neutral=0.06)
    else:
        words = rng.choice((" and ", ", ", " & ")).join(_noun(thing, rng) for thing in scene.things)
    words += f" {rng.choice(TAGS)}"
    if rng.random() < 0.4:
        words += f" {rng.choice(ALT_TAILS)}"
    if rng.random() < 0.15:
        words = f"{rng.choice(('new', 'best', 'cute', 'original', 'top 10'))} {words}"
    if rng.random() < 0.12:
        words += f" {rng.randint(1, 999)}"
    return words.title() if rng.random() < 0.25 else words


def _sentence(scene: Scene, rng: random.Random) -> str:
    """One plain statement about one thing, or about all of them."""
    if rng.random() < 0.25:
        return _statement(_article(_noun(rng.choice(scene.things), rng, neutral=0.06)), rng)
    return _full_sentence(scene, rng)


def _full_sentence(scene: Scene, rng: random.Random) -> str:
    return _statement(_relation(scene, rng, sure=0.0), rng)


def _detailed(scene: Scene, rng: random.Random) -> str:
    """All things with most of their attributes, where they are, and often the background."""
    text = _relation(scene, rng, sure=0.75)
    if rng.random() < 0.6:
        text += f" {rng.choice(('on', 'against', 'in front of'))} {_background(scene, rng)}"
    return _statement(text, rng)


def _story(scene: Scene, rng: random.Random) -> str:
    """Several sentences: the detailed one, the background, and chat that says nothing about the picture."""
    parts = [_statement(_relation(scene, rng, sure=0.8), rng).rstrip(".") + "."]
    if rng.random() < 0.7:
        parts.append(f"{rng.choice(('The background is', 'Behind is', 'All of it is on'))} {_background(scene, rng)}.")
    fillers = list(LONG_FILLERS)
    rng.shuffle(fillers)
    for filler in fillers[: rng.randint(1, 3)]:
        if num_pieces(" ".join([*parts, filler])) <= MAX_PIECES:
            parts.append(filler)
    return " ".join(parts)


def num_pieces(text: str) -> int:
    """Words and punctuation marks of a text: what byte-pair encoding sees before it splits rare words."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _statement(phrase: str, rng: random.Random) -> str:
    """The phrase alone, after an opening, or before a closing; with or without a full stop."""
    form = rng.random()
    if form < 0.5:
        phrase = f"{rng.choice(OPENINGS)} {phrase}"
    elif form < 0.6:
        phrase = f"{phrase}, {rng.choice(('nothing more', 'seen from the front', 'made with care'))}"
    phrase = phrase[0].upper() + phrase[1:] if rng.random() < 0.6 else phrase
    return phrase + ("." if rng.random() < 0.6 else "")


def _relation(scene: Scene, rng: random.Random, *, sure: float) -> str:
    """All things and where they stand to each other; `sure` is the chance that an attribute is spelled out."""
    nouns = [_article(_noun(thing, rng, sure=sure)) for thing in scene.things]
    if len(nouns) == 1:
        return nouns[0]
    if scene.layout == "scatter" or rng.random() < 0.2:
        rng.shuffle(nouns)
        return _join(nouns)
    if len(nouns) == 2:
        return _pair(nouns[0], nouns[1], across=scene.layout == "row", rng=rng)
    return _line(nouns, across=scene.layout == "row", rng=rng)


def _pair(first: str, second: str, *, across: bool, rng: random.Random) -> str:
    """`first` is left of, or above, `second`."""
    forward = ("to the left of", "left of") if across else ("above", "on top of", "over")
    backward = ("to the right of", "right of") if across else ("below", "under", "underneath")
    form = rng.randrange(3)
    if form == 0:
        return f"{first} {rng.choice(forward)} {second}"
    if form == 1:
        return f"{second} {rng.choice(backward)} {first}"
    near, far = ("on the left", "on the right") if across else ("at the top", "at the bottom")
    return f"{first} {near} and {second} {far}"


def _line(nouns: Sequence[str], *, across: bool, rng: random.Random) -> str:
    first, middle, last = nouns
    if rng.random() < 0.4:
        return f"{middle} between {first} and {last}"
    order = "from left to right" if across else "from top to bottom"
    return f"{_join([first, middle, last])}, {order}"


def _join(nouns: Sequence[str]) -> str:
    return f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _noun(thing: Thing, rng: random.Random, *, sure: float = 0.0, neutral: float = 0.0) -> str:
    """The thing with some of its attributes: `small striped red star`, `red star with spots`.

    Colour and shape are named almost always, size and texture with chance `sure` or now and then; with chance `neutral`
    a word for any shape stands in, and the colour is named.
    """
    shape = _synonym(SHAPE_WORDS[thing.shape], rng)
    named = rng.random() >= neutral
    colour = [_synonym(COLOUR_WORDS[thing.colour], rng)] if not named or rng.random() < 0.93 else []
    size = [_synonym(SIZE_WORDS[thing.size], rng)] if rng.random() < max(sure, 0.25) else []
    wants_texture = rng.random() < max(sure, 0.3) and (thing.texture != "solid" or rng.random() < 0.3)
    texture = [_synonym(TEXTURE_WORDS[thing.texture], rng)] if wants_texture else []
    order = [*size, *texture, *colour] if rng.random() < 0.6 else [*size, *colour, *texture]
    return " ".join([*order, shape if named else rng.choice(NEUTRAL_NOUNS)])


def _background(scene: Scene, rng: random.Random) -> str:
    kind = _synonym(BACKGROUND_WORDS[scene.background.kind], rng)
    kind = "polka dot" if kind == "polka" else kind
    words = rng.choice(([kind, scene.background.colour], [kind], [scene.background.colour]))
    return _article(" ".join([*words, rng.choice(("background", "background", "backdrop", "wall"))]))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def _synonym(words: Sequence[str], rng: random.Random) -> str:
    return words[0] if rng.random() < 0.65 else rng.choice(words)


def _tidy(text: str) -> str:
    """At least three words, so that no caption is shorter than five tokens."""
    return text if num_pieces(text) >= 3 else f"just {text}"
