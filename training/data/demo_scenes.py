"""Draw small scenes of coloured shapes: what is in a picture, where, and its pixels.

A scene is sampled as plain values first (`sample_scene`) and painted afterwards (`render`), so captions are written
from the values and never have to look at pixels. Positions, radii and pattern scales are fractions of the image side:
one scene can be painted at any size. All chance comes from one `random.Random`, so equal seeds give equal bytes.

    random.Random -> Scene(things, layout, background) -> PIL image
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Pixels = NDArray[np.float32]
Points = list[tuple[float, float]]

COLOURS: dict[str, Rgb] = {
    "red": (212, 36, 40),
    "orange": (246, 132, 28),
    "yellow": (250, 214, 44),
    "green": (46, 158, 74),
    "blue": (42, 96, 216),
    "purple": (130, 60, 176),
    "pink": (246, 128, 188),
    "brown": (124, 76, 42),
    "black": (26, 26, 30),
    "white": (247, 247, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
SIZES: dict[str, tuple[float, float]] = {"small": (0.24, 0.27), "medium": (0.31, 0.35), "large": (0.40, 0.44)}
"""Range of the radius of a single thing; crowded scenes scale it by `CROWDING`."""
TEXTURES = ("solid", "striped", "dotted", "checkered")
BACKGROUND_COLOURS: dict[str, Rgb] = {
    "cream": (251, 241, 216),
    "mint": (196, 233, 214),
    "lavender": (214, 206, 241),
    "peach": (251, 214, 192),
    "sky": (190, 221, 246),
    "silver": (192, 195, 201),
    "sand": (226, 206, 164),
    "lime": (216, 236, 166),
}
"""All light: with the dark outline of the things, a shape looks alike in every colour on every background."""
OUTLINE: Rgb = (24, 24, 34)
OUTLINE_WIDTH = 0.026
THICKEST_OUTLINE = 0.16
"""In radii: a thicker outline would hide the colour of small crescents."""
BACKGROUND_KINDS = ("plain", "gradient", "stripes", "dots", "checks", "noise", "clouds")

CROWDING = {1: 1.0, 2: 0.58, 3: 0.46}
MAX_OFFSET = 0.06
"""How far a single thing may be from the middle."""
NUM_THINGS_WEIGHTS = (0.5, 0.34, 0.16)
TEXTURE_WEIGHTS = (0.4, 0.2, 0.2, 0.2)
HELD_OUT_ONE_IN = 10
MIN_CONTRAST = 45.0
"""Smallest distance in RGB between a thing and its background."""
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object of a scene; position and radius are fractions of the image side, the angle is in degrees."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    tint: Rgb
    """The colour as painted: the named colour with a little jitter."""

    @property
    def words(self) -> str:
        """Its named attributes, without its exact place."""
        return f"{self.size} {self.colour} {self.texture} {self.shape}"


@dataclass(frozen=True)
class Background:
    """What is behind the things: a named pattern in a named colour."""

    kind: str
    colour: str
    accent: Rgb
    angle: float
    period: float
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """Things in reading order (left to right, or top to bottom), how they are laid out, and the background."""

    things: tuple[Thing, ...]
    layout: str
    """`single`, `row` (left to right), `column` (top to bottom) or `scatter` (no order)."""
    background: Background

    @property
    def description(self) -> str:
        """Everything that has a name, in one line; equal descriptions are the same scene up to jitter."""
        things = ", ".join(thing.words for thing in self.things)
        return f"{self.layout}: {things}; {self.background.kind} {self.background.colour}"

    @property
    def held_out(self) -> bool:
        """Whether this scene belongs to evaluation. Decided by its description, so the same for every seed."""
        return zlib.crc32(self.description.encode()) % HELD_OUT_ONE_IN == 0


def sample_scene(
    rng: random.Random,
    *,
    held_out: bool,
    num_things: int | None = None,
    colour: str | None = None,
    shape: str | None = None,
) -> Scene:
    """Draw scenes until one is on the wanted side of the held-out rule.

    Args:
        held_out: True for evaluation, False for training: no description is on both sides.
        num_things: 1 to 3; by default one half of the scenes has a single thing.
        colour, shape: fix these attributes of a single thing.
    """
    while True:
        count = num_things or rng.choices((1, 2, 3), weights=NUM_THINGS_WEIGHTS)[0]
        scene = _sample_any_scene(rng, count=count, colour=colour, shape=shape)
        if scene.held_out == held_out:
            return scene


def render(scene: Scene, *, image_size: int) -> Image.Image:
    """Paint a scene as an RGB image of `image_size` x `image_size` pixels."""
    canvas = Image.fromarray(_paint_background(scene.background, image_size))
    for thing in scene.things:
        _paint_thing(canvas, thing)
    return canvas


def _sample_any_scene(rng: random.Random, *, count: int, colour: str | None, shape: str | None) -> Scene:
    layout = {1: "single", 2: rng.choice(("row", "column")), 3: rng.choice(("row", "column", "scatter"))}[count]
    places = _sample_places(rng, count=count, layout=layout)
    things: list[Thing] = []
    while len(things) < count:
        thing = _sample_thing(rng, place=places[len(things)], crowding=CROWDING[count], colour=colour, shape=shape)
        if all((thing.colour, thing.shape) != (other.colour, other.shape) for other in things):
            things.append(thing)
    return Scene(tuple(things), layout, _sample_background(rng, tints=[thing.tint for thing in things]))


def _sample_places(rng: random.Random, *, count: int, layout: str) -> list[tuple[float, float]]:
    """Centres of the things; neighbours in a row or column are far enough apart not to hide each other."""
    if layout == "single":
        return [(0.0, 0.0)]  # placed by `_sample_thing`, which knows how much room its size leaves
    if layout == "scatter":
        places = [(0.27, 0.28), (0.73, 0.3), (rng.choice((0.28, 0.5, 0.72)), 0.74)]
        rng.shuffle(places)
        return [(x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04)) for x, y in places]
    along = {2: (0.27, 0.73), 3: (0.19, 0.5, 0.81)}[count]
    swing = {2: 0.08, 3: 0.12}[count]
    places = [(a + rng.uniform(-0.025, 0.025), 0.5 + rng.uniform(-swing, swing)) for a in along]
    return places if layout == "row" else [(y, x) for x, y in places]


def _sample_thing(
    rng: random.Random, *, place: tuple[float, float], crowding: float, colour: str | None, shape: str | None
) -> Thing:
    size = rng.choice(tuple(SIZES))
    radius = rng.uniform(*SIZES[size]) * crowding
    x, y = place
    if crowding == 1.0:
        room = min(0.5 - radius, MAX_OFFSET)
        x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
    colour = colour or rng.choice(tuple(COLOURS))
    return Thing(
        shape=shape or rng.choice(SHAPES),
        colour=colour,
        size=size,
        texture=rng.choices(TEXTURES, weights=TEXTURE_WEIGHTS)[0],
        x=x,
        y=y,
        radius=radius,
        angle=rng.uniform(-15.0, 15.0),
        tint=_jitter(rng, COLOURS[colour], amount=12),
    )


def _sample_background(rng: random.Random, *, tints: list[Rgb]) -> Background:
    visible = [
        name for name, rgb in BACKGROUND_COLOURS.items() if all(math.dist(rgb, tint) > MIN_CONTRAST for tint in tints)
    ]
    colour = rng.choice(visible)
    base = BACKGROUND_COLOURS[colour]
    change = rng.choice((-1, 1)) * rng.randint(16, 34)
    accent = _clip_rgb((base[0] + change, base[1] + change, base[2] + change))
    return Background(
        kind=rng.choice(BACKGROUND_KINDS),
        colour=colour,
        accent=_jitter(rng, accent, amount=8),
        angle=rng.uniform(0.0, 180.0),
        period=rng.uniform(0.09, 0.2),
        noise_seed=rng.getrandbits(32),
    )


def _jitter(rng: random.Random, colour: Rgb, *, amount: int) -> Rgb:
    red, green, blue = colour
    return _clip_rgb(
        (red + rng.randint(-amount, amount), green + rng.randint(-amount, amount), blue + rng.randint(-amount, amount))
    )


def _clip_rgb(colour: Rgb) -> Rgb:
    red, green, blue = (min(255, max(0, channel)) for channel in colour)
    return red, green, blue


def _paint_background(background: Background, image_size: int) -> NDArray[np.uint8]:
    """The base colour mixed with the accent by a weight per pixel; the pattern's kind decides the weights."""
    grid = np.linspace(0.0, 1.0, image_size, dtype=np.float32)
    weights = _background_weights(background, grid)[:, :, None]
    base = np.array(BACKGROUND_COLOURS[background.colour], dtype=np.float32)
    accent = np.array(background.accent, dtype=np.float32)
    pixels: Pixels = base + (accent - base) * weights  # [P, P, 1] x [3] -> [P, P, 3]
    painted: NDArray[np.uint8] = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return painted


def _background_weights(background: Background, grid: Pixels) -> Pixels:
    size = len(grid)
    if background.kind == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if background.kind == "noise":
        return _noise(background.noise_seed, size) * 2.0 - 1.0
    if background.kind == "clouds":
        coarse = Image.fromarray((_noise(background.noise_seed, 6) * 255).astype(np.uint8))
        smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(smooth, dtype=np.float32) / 255.0 * 2.5 - 0.5
    if background.kind == "gradient":
        u, _ = _rotated_grid(grid, background.angle)
        return u * 2.2
    return _pattern(background.kind, grid, angle=background.angle, period=background.period)


def _noise(seed: int, size: int) -> Pixels:
    """Uniform noise in [0, 1] from Python's generator, whose stream does not change between versions."""
    values = np.frombuffer(random.Random(seed).randbytes(size * size), dtype=np.uint8)
    return values.reshape(size, size).astype(np.float32) / 255.0


def _rotated_grid(grid: Pixels, angle: float) -> tuple[Pixels, Pixels]:
    cos, sin = np.float32(math.cos(math.radians(angle))), np.float32(math.sin(math.radians(angle)))
    centred = grid - np.float32(0.5)
    x, y = centred[None, :], centred[:, None]
    return x * cos + y * sin, y * cos - x * sin


def _pattern(kind: str, grid: Pixels, *, angle: float, period: float) -> Pixels:
    """Weights in [0, 1] of a repeating pattern, with edges as soft as one pixel."""
    u, v = _rotated_grid(grid, angle)
    turns = np.float32(2 * math.pi / period)
    pixels_per_period = period / float(grid[1] - grid[0])
    sharpness = np.float32(max(1.0, pixels_per_period / 4))
    waves_u, waves_v = np.sin(u * turns), np.sin(v * turns)
    wave = {"stripes": waves_u, "dots": waves_u + waves_v - np.float32(0.7), "checks": waves_u * waves_v * 1.5}[kind]
    weights: Pixels = np.clip(wave * sharpness + np.float32(0.5), 0.0, 1.0)
    return weights


def _paint_thing(canvas: Image.Image, thing: Thing) -> None:
    """A soft shadow, a dark outline and the textured inside, each through an anti-aliased mask of the shape's box."""
    side = canvas.width
    half = math.ceil(thing.radius * side) + 2
    left, top = round(thing.x * side) - half, round(thing.y * side) - half
    centre = (thing.x * side - left, thing.y * side - top)
    shape = _shape_mask(thing, box=2 * half, centre=centre, radius=thing.radius * side)  # supersampled
    outline = min(OUTLINE_WIDTH, THICKEST_OUTLINE * thing.radius) * side
    mask, inside = shape.reduce(SUPERSAMPLING), _erode(shape, outline).reduce(SUPERSAMPLING)
    drop = max(1, side // 50)
    shadow = mask.filter(ImageFilter.GaussianBlur(drop)).point([value * 2 // 5 for value in range(256)])
    canvas.paste((12, 12, 24), (left + drop, top + drop), shadow)
    canvas.paste(OUTLINE, (left, top), mask)
    canvas.paste(Image.fromarray(_paint_texture(thing, box=2 * half, side=side)), (left, top), inside)


def _erode(mask: Image.Image, pixels: float) -> Image.Image:
    """What is at least that far from the edge: where the mean over a box is full, all of the box is."""
    mean = mask.filter(ImageFilter.BoxBlur(round(pixels * SUPERSAMPLING)))
    return mean.point([255 if value == 255 else 0 for value in range(256)])


def _paint_texture(thing: Thing, *, box: int, side: int) -> NDArray[np.uint8]:
    grid = np.arange(box, dtype=np.float32) / np.float32(side)
    _, v = _rotated_grid(grid - grid.mean() + np.float32(0.5), 20.0)
    light = np.float32(1.0) - np.float32(0.18) * v / np.float32(thing.radius)  # a little brighter towards the top
    base = np.array(thing.tint, dtype=np.float32)
    pixels: Pixels = np.broadcast_to(base, (box, box, 3))
    if thing.texture != "solid":
        kind = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}[thing.texture]
        period = max(0.45 * thing.radius, 4.5 / side)  # below this many pixels per period a texture is a grey
        weights = _pattern(kind, grid, angle=thing.angle + 45.0, period=period)[:, :, None]
        pixels = pixels + (_texture_accent(thing.tint) - base) * weights
    return np.clip(pixels * light[:, :, None] + 0.5, 0, 255).astype(np.uint8)


def _texture_accent(tint: Rgb) -> Pixels:
    """A shade of the same hue: lighter for dark colours, darker for light ones, so the colour keeps its name."""
    base = np.array(tint, dtype=np.float32)
    brightness = float(base @ np.array([0.3, 0.59, 0.11], dtype=np.float32))
    return base * np.float32(0.7) if brightness > 140 else base + (np.float32(255.0) - base) * np.float32(0.4)


def _shape_mask(thing: Thing, *, box: int, centre: tuple[float, float], radius: float) -> Image.Image:
    scale = SUPERSAMPLING
    mask = Image.new("L", (box * scale, box * scale), 0)
    draw = ImageDraw.Draw(mask)
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))

    def place(points: Points) -> Points:
        return [
            (
                (centre[0] + radius * (x * cos - y * sin)) * scale,
                (centre[1] + radius * (x * sin + y * cos)) * scale,
            )
            for x, y in points
        ]

    outline, hole = _OUTLINES[thing.shape]
    draw.polygon(place(outline), fill=255)
    if hole:
        draw.polygon(place(hole), fill=0)
    return mask


def _arc(*, radius: float = 1.0, x: float = 0.0, num_points: int = 48) -> Points:
    angles = [2 * math.pi * i / num_points for i in range(num_points)]
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _regular(num_corners: int, *, inner: float | None = None) -> Points:
    """Corners of a regular polygon, its top corner up; with `inner`, of a star with that inner radius."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = num_corners * len(radii)
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart(num_points: int = 48) -> Points:
    points = []
    for i in range(num_points):
        t = 2 * math.pi * i / num_points
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


def _cross(arm: float = 0.34) -> Points:
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]  # one quarter, turned three more times
    points = []
    for _ in range(4):
        points += corner
        corner = [(-y, x) for x, y in corner]
    return points


_OUTLINES: dict[str, tuple[Points, Points]] = {
    "circle": (_arc(radius=0.95), []),
    "square": ([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], []),
    "triangle": (_regular(3), []),
    "star": (_regular(5, inner=0.42), []),
    "heart": (_heart(), []),
    "cross": (_cross(), []),
    "ring": (_arc(), _arc(radius=0.5)),
    "crescent": (_arc(), _arc(radius=0.82, x=0.52)),
}
"""Outline and hole of each shape inside the unit circle, y down."""
