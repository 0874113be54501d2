"""The project's own drawn scenes: labelled, without end, drawn when they are asked for."""

from __future__ import annotations

import random

from PIL import Image

from svdprune.calib.scenes import KINDS, ask, draw_scene
from svdprune.calib.sources.base import Entry, Labelled, Listing, register
from svdprune.calib.sources.protocols import EXACT

HELD_OUT = "held-out"  # training draws from other seeds
LABEL_SHARE = 0.7


@register("scenes")
def list_scenes(rest: str, count: int, seed: int) -> Listing:
    """`count` scenes with one question of each kind they allow. `rest` names the series ("held-out" when empty)."""
    series = rest or HELD_OUT
    name = series if seed == 0 else f"{series}/{seed}"
    entries = [_entry(f"{name}:{number}") for number in range(count)]
    text = f"drawn scenes, series {series}, seed {seed}, one question of each kind that a scene allows"
    return Listing(entries, EXACT, f"{text}; {EXACT.description}")


def _entry(key: str) -> Entry:
    def load() -> tuple[Image.Image, list[Labelled]]:
        rng = random.Random(key)
        scene = draw_scene(rng, label_share=LABEL_SHARE)
        asked = [question for kind in KINDS if (question := ask(rng, scene, kind)) is not None]
        return scene.image, [Labelled(q.text, [q.answer], q.kind) for q in asked]

    return Entry(key, load)
