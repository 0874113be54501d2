"""Questions about a drawn scene whose answers follow from the objects alone.

A question that a person could answer two ways (a centre on the border of two cells, two objects of one
colour) is never asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from svdprune.calib.scenes.draw import COLORS, SHAPES, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True)
class Question:
    """`kind` is a member of `KINDS`; `answer` is the exact text expected."""

    kind: str
    text: str
    answer: str


def ask(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """One question of `kind` about `scene`, or None when the scene allows none of that kind."""
    found = _MAKERS[kind](rng, scene)
    return None if found is None else Question(kind, *found)


def _color(rng: random.Random, scene: Scene) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    form = rng.choice(("What color is the {}?", "Which color does the {} have?"))
    return form.format(item.shape), item.color


def _shape(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    colors = [o.color for o in scene.objects]
    unique = [o for o in scene.objects if colors.count(o.color) == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    form = rng.choice(("What shape is the {} object?", "What is the {} thing?"))
    return form.format(item.color), item.shape


def _count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    form = rng.choice(("How many objects are there?", "How many things are in the picture?"))
    return form, NUMBERS[len(scene.objects)]


def _existence(rng: random.Random, scene: Scene) -> tuple[str, str]:
    present = {(o.color, o.shape) for o in scene.objects}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
    else:
        near = rng.choice(scene.objects)  # half of the absent ones share a property with a present one
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
        if rng.random() < 0.5:
            absent = [(c, s) for c, s in absent if c == near.color or s == near.shape]
        color, shape = rng.choice(absent)
    answer = "yes" if (color, shape) in present else "no"
    return f"Is there {'an' if color[0] == 'o' else 'a'} {color} {shape}?", answer


def _place(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    width, height = scene.image.size

    def cell(value: float, size: int) -> int | None:
        part = 3 * value / size
        return None if abs(part - round(part)) < 0.06 and 0 < round(part) < 3 else min(2, int(part))

    clear = []
    for o in scene.objects:
        row, column = cell(o.y, height), cell(o.x, width)
        if row is not None and column is not None:
            clear.append((o, f"{ROWS[row]} {COLUMNS[column]}"))
    if not clear:
        return None
    item, answer = rng.choice(clear)
    return f"Where is the {item.shape}?", answer


def _relation(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    width, height = scene.image.size
    pairs: list[tuple[SceneObject, SceneObject, str, bool]] = []
    for a in scene.objects:
        for b in scene.objects:
            if a is b:
                continue
            if abs(a.x - b.x) > 0.08 * width:
                pairs.append((a, b, "left of", a.x < b.x))
            if abs(a.y - b.y) > 0.08 * height:
                pairs.append((a, b, "above", a.y < b.y))
    if not pairs:
        return None
    a, b, word, truth = rng.choice(pairs)
    return f"Is the {a.shape} {word} the {b.shape}?", "yes" if truth else "no"


def _detail(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    labelled = [o for o in scene.objects if o.label]
    if not labelled:
        return None
    item = rng.choice(labelled)
    return f"What is written on the {item.shape}?", item.label


_MAKERS: dict[str, Callable[[random.Random, Scene], tuple[str, str] | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "place": _place,
    "relation": _relation,
    "detail": _detail,
}
KINDS: tuple[str, ...] = tuple(_MAKERS)
