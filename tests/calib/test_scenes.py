"""Drawn scenes: repeatable, and their questions answerable from what is drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest

from svdprune.calib.scenes import COLORS, KINDS, SHAPES, Scene, SceneObject, ask, draw_scene


def scene(*objects: SceneObject) -> Scene:
    drawn = draw_scene(random.Random(0))
    return Scene(drawn.image, objects, drawn.cover, drawn.glyphs)


def test_a_seed_is_a_picture() -> None:
    first, second, other = (draw_scene(random.Random(seed)) for seed in "aab")
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.objects == second.objects
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


@pytest.mark.parametrize("seed", range(20))
def test_objects_are_where_they_are_said_to_be(seed: int) -> None:
    drawn = draw_scene(random.Random(seed))
    pixels = np.asarray(drawn.image)
    assert pixels.shape == (336, 336, 3)
    assert 1 <= len(drawn.objects) <= 5
    assert len({o.shape for o in drawn.objects}) == len(drawn.objects)
    for number, item in enumerate(drawn.objects, 1):
        rows, columns = np.nonzero(drawn.cover == number)
        assert abs(columns.mean() - item.x) < item.radius / 2
        assert abs(rows.mean() - item.y) < item.radius / 2
        colored = pixels[(drawn.cover == number) & (drawn.glyphs == 0)]
        nearest = np.abs(np.median(colored, 0) - np.array(COLORS[item.color])).max()
        assert nearest <= 40 or item.label  # most of a small labelled object may be its plate
        shown = {chr(c) for c in np.unique(drawn.glyphs[drawn.cover == number]) if c}
        assert shown == set(item.label)


def test_a_window_is_drawn_at_the_same_scale() -> None:
    sizes = [o.radius for i in range(50) for o in draw_scene(random.Random(i), 112, 112, (1, 2)).objects]
    full = [o.radius for i in range(50) for o in draw_scene(random.Random(i)).objects]
    assert min(sizes) >= 18
    assert abs(np.mean(sizes) - np.mean(full)) < 6


def test_every_kind_is_asked_and_answered_from_the_objects() -> None:
    rng = random.Random(1)
    seen: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for i in range(300):
        drawn = draw_scene(random.Random(i))
        for kind in KINDS:
            question = ask(rng, drawn, kind)
            if question is not None:
                assert question.kind == kind
                seen[kind].add(question.answer)
    assert seen["color"] == set(COLORS)
    assert seen["shape"] == set(SHAPES)
    assert seen["count"] == {"one", "two", "three", "four", "five"}
    assert seen["existence"] == seen["relation"] == {"yes", "no"}
    assert len(seen["place"]) == 9
    assert {1, 2, 3} == {len(answer) for answer in seen["detail"]}


def test_answers_are_right() -> None:
    pair = scene(SceneObject("star", "red", 50, 60, 20, "K7"), SceneObject("ring", "blue", 290, 170, 30, ""))
    for i in range(200):
        rng = random.Random(i)
        for kind in KINDS:
            question = ask(rng, pair, kind)
            assert question is not None
            truth = {
                "What color is the star?": "red",
                "Which color does the star have?": "red",
                "What color is the ring?": "blue",
                "Which color does the ring have?": "blue",
                "What shape is the red object?": "star",
                "What is the red thing?": "star",
                "What shape is the blue object?": "ring",
                "What is the blue thing?": "ring",
                "How many objects are there?": "two",
                "How many things are in the picture?": "two",
                "Is there a red star?": "yes",
                "Is there a blue ring?": "yes",
                "Where is the star?": "top left",
                "Where is the ring?": "middle right",
                "Is the star left of the ring?": "yes",
                "Is the ring left of the star?": "no",
                "Is the star above the ring?": "yes",
                "Is the ring above the star?": "no",
                "What is written on the star?": "K7",
            }
            absent = "no" if question.kind == "existence" else None
            assert question.answer == truth.get(question.text, absent), question


def test_what_could_be_answered_two_ways_is_not_asked() -> None:
    rng = random.Random(0)
    border = scene(SceneObject("star", "red", 112, 50, 20, ""), SceneObject("ring", "red", 115, 52, 30, ""))
    for _ in range(50):
        assert ask(rng, border, "place") is None  # on the line between two cells
        assert ask(rng, border, "shape") is None  # two red things
        assert ask(rng, border, "relation") is None  # neither is clearly left of or above the other
        assert ask(rng, border, "detail") is None  # nothing written
