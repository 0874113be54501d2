"""Tiles without a model: how candidates fill slots, what an incomplete choice means, and which marks stay."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.preprocess import ImageSettings, preprocess
from svdprune.runtime.tiling import Cut, TilesInfo, tiling_of
from svdprune.runtime.tiling.sequence import kept_marks, sequence
from svdprune.runtime.tiling.slots import chosen, lay_out

SETTINGS = {"kind": "anyres", "tile": 4, "side": 2, "pinpoints": [[4, 8], [8, 8]]}
TILES = TilesInfo(least=3, likely=5, most=5, per_tile=4, budget="picture")


def cut(width: int = 9, height: int = 9, **changes: object) -> Cut:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return tiling_of({**SETTINGS, **changes}).cut(Image.fromarray(pixels), 3)


def test_a_picture_fills_the_first_slots() -> None:
    made = cut(8, 4)
    slots = lay_out(made, TILES, 20)
    assert slots.sources.shape == (1, 20, 1)
    np.testing.assert_array_equal(slots.candidates[0, :12], np.arange(12))
    assert (slots.candidates[0, 12:] == -1).all() and (slots.weights[0, 12:] == 0).all()
    np.testing.assert_array_equal(made.sources[:, 0], [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11])  # lines across two tiles
    np.testing.assert_array_equal(made.places, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12])
    np.testing.assert_array_equal(made.marks, [[8, -1, 4], [13, -1, 9]])
    assert made.total == 14


def test_a_choice_by_tile_comes_back_in_the_order_of_the_prompt() -> None:
    made = cut(8, 4)
    slots = lay_out(made, dataclasses.replace(TILES, budget="tile"), 4)
    kept = np.array([[0, 3], [1, 2], [0, 1]])
    features = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    found = chosen(slots, features, kept, np.zeros((3, 4), np.float32), 12)
    np.testing.assert_array_equal(found.kept, [0, 3, 5, 6, 7, 8])
    np.testing.assert_array_equal(found.features[:, 0], [0, 1, 2, 4, 5, 3])


def test_empty_slots_that_were_kept_are_dropped() -> None:
    slots = lay_out(cut(8, 4), TILES, 20)
    kept = np.array([[1, 11, 12, 19]])
    found = chosen(slots, np.ones((1, 4, 2), np.float32), kept, np.arange(20, dtype=np.float32)[None], 12)
    np.testing.assert_array_equal(found.kept, [1, 11])
    np.testing.assert_array_equal(found.scores, np.arange(12))


def test_marks_stay_with_their_line_or_always() -> None:
    marks = np.array([[4, 7, -1], [8, -1, 5], [12, -1, 9]])
    np.testing.assert_array_equal(kept_marks(marks, np.array([0, 5, 7])), marks[:2])
    np.testing.assert_array_equal(kept_marks(marks, np.array([4])), marks[:1])


def test_a_mark_before_a_tile_stays_with_the_tile() -> None:
    marks = np.array([[0, 7, 3], [4, 8, 7], [8, 9, -1]])  # two tiles of three tokens, a mark before each and one after
    for places, stay in (([1], [0, 2]), ([7], [1, 2]), ([3, 5], [0, 1, 2]), ([2, 3], [0, 2])):
        np.testing.assert_array_equal(kept_marks(marks, np.array(places)), marks[stay])


def test_marks_are_tokens_or_rows_of_the_bundle() -> None:
    made = dataclasses.replace(cut(8, 4), marks=np.array([[8, 5, -1], [13, -1, 9]]))
    rows, places = sequence(
        made, np.array([3, 9]), np.zeros((2, 1), np.float32), lambda ids: np.full((len(ids), 1), ids[0], np.float32),
        np.array([[-9.0]], np.float32),
    )  # fmt: skip
    np.testing.assert_array_equal(places, [3, 8, 10, 13])
    np.testing.assert_array_equal(rows[:, 0], [0, 5, 0, -9])


def test_more_tiles_than_the_graph_takes_are_refused() -> None:
    with pytest.raises(BundleError, match="makes 5 tiles, the vision graph takes 3 to 3"):
        lay_out(cut(8, 8), dataclasses.replace(TILES, likely=3, most=3), 20)
    with pytest.raises(BundleError, match="more tokens than the 11"):
        lay_out(cut(8, 4), TILES, 11)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "spiral"}, "the tiling 'spiral' is not known"),
        ({"pinpoints": [[4, 6]]}, "multiples of tiling.tile"),
        ({"pinpoints": []}, "multiples of tiling.tile"),
        ({"tile": "4"}, "tiling.tile must be a whole number"),
        ({"extra": 1}, "tiling.extra is not known"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        tiling_of({**SETTINGS, **changes})


def test_a_picture_that_resampling_leaves_nothing_of_is_refused() -> None:
    with pytest.raises(UserError, match="too long and thin"):
        cut(1, 5, pinpoints=[[40, 4]], pool_above=1)


def test_whole_pictures_and_tiles_are_not_mixed_up() -> None:
    content = {
        "resize": None, "resample": 3, "crop": None, "rescale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3,
        "tiling": SETTINGS,
    }  # fmt: skip
    settings = ImageSettings.from_json(json.loads(json.dumps(content)))
    with pytest.raises(UserError, match="cuts a picture into tiles"):
        preprocess(Image.new("RGB", (8, 4)), settings)


INTERNVL = {"kind": "internvl", "tile": 4, "side": 2, "least": 1, "most": 6}
IDEFICS3 = {
    "kind": "idefics3", "tile": 4, "side": 2, "longest": 8, "split": True,
    "cells": [[[9, 11], [9, 12]], [[9, 21], [9, 22]]], "line": [5], "whole": [6, 9, 7], "alone": [9, 7], "end": [9],
}  # fmt: skip


def grey(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.arange(width * height, dtype=np.uint8).reshape(height, width)).convert("RGB")


def test_internvl_takes_the_grid_of_the_nearest_shape_and_the_whole() -> None:
    tiling = tiling_of(INTERNVL)
    assert (tiling.limits, tiling.most_tokens, tiling.marks_with(9)) == ((1, 7, 7), 28, 0)
    for size, tiles, grids in (
        ((40, 13), 4, [(2, 6), (2, 2)]),
        ((12, 13), 5, [(4, 4), (2, 2)]),  # of equally near grids one that the picture fills
        ((5, 5), 1, [(2, 2)]),  # not four tiles for less than two tiles' pixels
        ((1, 99), 7, [(12, 2), (2, 2)]),
    ):
        made = tiling.cut(grey(*size), 3)
        assert len(made.pixels) == tiles
        assert [view.grid for view in made.views] == grids
        assert made.total == len(made.places) == 4 * tiles
    made = tiling.cut(grey(40, 13), 3)
    np.testing.assert_array_equal(np.concatenate(list(made.pixels[:3]), 1), made.views[0].pixels)
    np.testing.assert_array_equal(
        made.views[0].part(np.arange(16), np.array([4]))[0], [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    )


def test_idefics3_writes_its_tokens_around_the_tiles() -> None:
    tiling = tiling_of(IDEFICS3)
    assert (tiling.limits, tiling.most_tokens) == ((3, 5, 5), 20)
    assert tiling.marks_with(1) == 2 + 1 + 3 + 1
    wide, square = tiling.cut(grey(40, 13), 1), tiling.cut(grey(9, 9), 1)
    text = np.zeros(square.total, np.int64)
    text[square.marks[:, 0]] = square.marks[:, 1]
    first, second = [9, 11, *[0] * 4, 9, 12, *[0] * 4, 5], [9, 21, *[0] * 4, 9, 22, *[0] * 4]
    assert text.tolist() == [*first, *second, 6, 9, 7, *[0] * 4, 9]
    assert (wide.total, len(wide.pixels)) == (2 * 6 + 3 + 4 + 1, 3)
    alone = tiling_of({**IDEFICS3, "split": False, "cells": []})
    assert alone.limits == (1, 1, 1)
    assert alone.cut(grey(40, 13), 1).marks[:, 1].tolist() == [9, 7, 9]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**INTERNVL, "most": 0}, "below its `least`"),
        ({**INTERNVL, "tile": 0}, "sizes below 1"),
        ({**INTERNVL, "thumbnail": True}, "tiling.thumbnail is not known"),
        ({**IDEFICS3, "longest": 0}, "must be 1 or more"),
        ({**IDEFICS3, "longest": 12}, "no tokens for a grid of 3 x 3"),
        ({**IDEFICS3, "line": 5}, "tiling.line must be a list"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        tiling_of(settings)
