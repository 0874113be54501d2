"""Draw one scene: a varied background and one to five labelled or plain objects.

Object sizes are absolute (pixels), not relative to the canvas, so a small canvas is a crop of a large
one as far as a patch is concerned: a vision encoder can be trained cheaply on small windows first.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "green": (40, 160, 60),
    "blue": (44, 84, 222),
    "yellow": (242, 214, 44),
    "purple": (146, 56, 190),
    "orange": (246, 138, 28),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
DIGITS = "0123456789"
LETTERS = "ACEFHKLMNPRTUXY"  # none that looks like a digit or like another of these
RADIUS_RANGE = (18.0, 44.0)  # pixels
LABEL_MIN_RADIUS = 28.0  # an object smaller than this cannot carry a legible label
SUPERSAMPLE = 2  # masks are drawn this much larger and averaged down: Pillow's polygons are not anti-aliased


@dataclass(frozen=True)
class SceneObject:
    """One object: its names, its centre and radius in pixels, and the text drawn on it ("" for none)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    label: str


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    `cover` is uint8 (height, width): 0 for background, i + 1 where object i is seen.
    `glyphs` is uint8 (height, width): 0, or the character code where the cell of a label's character is.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    cover: np.ndarray
    glyphs: np.ndarray


def draw_scene(
    rng: random.Random,
    width: int = 336,
    height: int = 336,
    count: tuple[int, int] = (1, 5),
    label_share: float = 0.5,
) -> Scene:
    """Draw a scene from `rng`; the same generator state gives the same picture.

    `count` bounds the number of objects wished for; a crowded canvas may hold fewer, never none.
    `label_share` is the chance that an object large enough carries a label.
    """
    image = _background(rng, width, height)
    cover, glyphs = Image.new("L", (width, height), 0), Image.new("L", (width, height), 0)
    objects: list[SceneObject] = []
    shapes = rng.sample(SHAPES, rng.randint(*count))
    for shape in shapes:
        place = _free_place(rng, objects, width, height)
        if place is None:
            continue
        x, y, radius = place
        color = rng.choice(tuple(COLORS))
        label = _label(rng, radius) if rng.random() < label_share else ""
        item = SceneObject(shape, color, x, y, radius, label)
        _paint(rng, image, cover, glyphs, item, len(objects) + 1)
        objects.append(item)
    return Scene(image, tuple(objects), np.asarray(cover), np.asarray(glyphs))


def _free_place(
    rng: random.Random, objects: list[SceneObject], width: int, height: int
) -> tuple[float, float, float] | None:
    """A centre and radius that touch no other object, or None when forty tries found none."""
    for _ in range(40):
        radius = rng.uniform(*RADIUS_RANGE)
        margin = radius * 1.12 + 1
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        if all(math.hypot(x - o.x, y - o.y) > 1.12 * (radius + o.radius) for o in objects):
            return x, y, radius
    return None


def _label(rng: random.Random, radius: float) -> str:
    """A digit, or a label of two or three characters; "" when the object is too small to carry one."""
    if radius < LABEL_MIN_RADIUS:
        return ""
    if rng.random() < 0.5:
        return rng.choice(DIGITS)
    length = 3 if radius > 36 and rng.random() < 0.4 else 2
    return "".join(rng.choice(LETTERS + DIGITS) for _ in range(length))


def _paint(
    rng: random.Random, image: Image.Image, cover: Image.Image, glyphs: Image.Image, item: SceneObject, number: int
) -> None:
    tint = [rng.randint(-14, 14) for _ in range(3)]
    fill = tuple(min(255, max(0, c + t)) for c, t in zip(COLORS[item.color], tint, strict=True))
    half = math.ceil(item.radius * 1.2) + 1
    left, top = math.floor(item.x) - half, math.floor(item.y) - half
    side = 2 * half + 1
    big = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE), 0)
    cx, cy = (item.x - left) * SUPERSAMPLE, (item.y - top) * SUPERSAMPLE
    _shape(ImageDraw.Draw(big), item.shape, cx, cy, item.radius * SUPERSAMPLE, rng.uniform(-0.4, 0.4))
    mask = big.resize((side, side), Image.Resampling.BOX)
    image.paste(fill, (left, top), mask)
    cover.paste(number, (left, top), mask.point(lambda v: 255 if v > 127 else 0))
    if item.label:
        _plate(rng, image, cover, glyphs, item, number)


def _plate(
    rng: random.Random, image: Image.Image, cover: Image.Image, glyphs: Image.Image, item: SceneObject, number: int
) -> None:
    """The label on a small plate, dark on light or light on dark, so that any shape and colour can carry it."""
    font = _font(rng.choice((20, 22, 24)) + (4 if len(item.label) == 1 else 0))
    box = font.getbbox(item.label)
    text_width, text_height = box[2] - box[0], box[3] - box[1]
    w, h = text_width / 2 + 4, text_height / 2 + 4
    light = rng.random() < 0.5
    back, ink = ((250, 250, 250), (10, 10, 10)) if light else ((10, 10, 10), (250, 250, 250))
    bounds = (round(item.x - w), round(item.y - h), round(item.x + w), round(item.y + h))
    draw = ImageDraw.Draw(image)
    draw.rectangle(bounds, fill=back)
    draw.text((item.x - text_width / 2 - box[0], item.y - text_height / 2 - box[1]), item.label, fill=ink, font=font)
    ImageDraw.Draw(cover).rectangle(bounds, fill=number)
    left = item.x - text_width / 2 - box[0]
    for i, character in enumerate(item.label):
        cell = (
            left + font.getlength(item.label[:i]),
            bounds[1],
            left + font.getlength(item.label[: i + 1]) - 1,
            bounds[3],
        )
        ImageDraw.Draw(glyphs).rectangle(cell, fill=ord(character))


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # the font inside Pillow: the same on every machine


def _shape(draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, turn: float) -> None:
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    elif shape == "ring":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        q = 0.6 * r
        draw.ellipse((cx - q, cy - q, cx + q, cy + q), fill=0)
    else:
        cos, sin = math.cos(turn), math.sin(turn)
        draw.polygon(
            [(cx + r * (x * cos - y * sin), cy + r * (x * sin + y * cos)) for x, y in _outline(shape)], fill=255
        )


@functools.cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The polygon of a shape about the origin, unit radius, y downwards."""

    def spokes(n: int, start: float, radii: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
        angles = (start + 2 * math.pi * i / n for i in range(n))
        return tuple(
            (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
        )

    if shape == "square":
        return spokes(4, math.pi / 4, (1.1,))
    if shape == "triangle":
        return spokes(3, -math.pi / 2, (1.15,))
    if shape == "star":
        return spokes(10, -math.pi / 2, (1.15, 0.48))
    if shape == "diamond":
        return ((0.68, 0.0), (0.0, 1.18), (-0.68, 0.0), (0.0, -1.18))
    if shape == "cross":
        w = 0.36
        quarter = ((w, -1.0), (w, -w), (1.0, -w))
        points: list[tuple[float, float]] = []
        for _ in range(4):
            points.extend(quarter)
            quarter = tuple((-y, x) for x, y in quarter)  # type: ignore[assignment]
        return tuple(points)
    if shape == "heart":
        ts = (2 * math.pi * i / 40 for i in range(40))
        return tuple(
            (
                math.sin(t) ** 3 * 1.05,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5,
            )
            for t in ts
        )
    raise ValueError(f"no outline for {shape!r}")


def _background(rng: random.Random, width: int, height: int) -> Image.Image:
    """A gradient or a soft texture, with noise and small distractors (lines, dots) over it."""
    noise = np.random.default_rng(rng.getrandbits(32))
    base = noise.uniform(50, 205, 3)
    if rng.random() < 0.5:
        corners = base + noise.normal(0, 30, (2, 2, 3))
    else:
        corners = base + noise.normal(0, rng.uniform(6, 26), (rng.randint(3, 9), rng.randint(3, 9), 3))
    small = Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 6)):
        ink = tuple(int(v) for v in noise.integers(20, 236, 3))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if rng.random() < 0.5:
            draw.line((x, y, x + rng.uniform(-70, 70), y + rng.uniform(-70, 70)), fill=ink, width=rng.randint(1, 3))
        else:
            dot = rng.uniform(1.5, 4.5)
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=ink)
    strength = rng.uniform(0, 9)
    grain = _grain()
    oy, ox = rng.randrange(grain.shape[0]), rng.randrange(grain.shape[1])
    tile = np.roll(grain, (oy, ox), (0, 1))
    reps = (-(-height // tile.shape[0]), -(-width // tile.shape[1]))
    speckle = np.tile(tile, reps)[:height, :width, None] * strength
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + speckle, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """One fixed tile of unit noise, shifted for each picture: drawing it afresh would cost more than the rest."""
    return np.random.default_rng(20260411).standard_normal((192, 192)).astype(np.float32)
