"""Pictures that are chosen from together, and the tilings for prompts of several pictures and for videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.preprocess import ImageSettings, preprocess
from svdprune.runtime.tiling import TilesInfo, tiling_of, video_tiling_of
from svdprune.runtime.tiling.pictured import pictured
from svdprune.runtime.tiling.see import joined, parted
from svdprune.runtime.tiling.slots import chosen, lay_out

SQUARE = {"kind": "square", "tile": 6, "side": 3, "background": [1, 2, 3]}
WHOLE = {"kind": "whole", "height": 6, "width": 6, "grid": [3, 3], "resize": {"shortest_edge": 6},
         "crop": {"height": 6, "width": 6}}  # fmt: skip
ANYRES = {"kind": "anyres", "tile": 6, "side": 3, "pinpoints": [[6, 12], [12, 6]], "pool_above": None}
NESTED = {**ANYRES, "several": SQUARE, "video": {"kind": "pooled", "tile": 6, "side": 3}}


def embed(ids: object) -> np.ndarray:
    raise AssertionError("no mark here is a token")


def test_a_whole_picture_is_prepared_as_without_tiles() -> None:
    image = tiny.picture(1, (19, 13))
    cut = tiling_of(json.loads(json.dumps(WHOLE))).cut(image, 3)
    settings = ImageSettings({"shortest_edge": 6}, 3, {"height": 6, "width": 6}, 1.0, [0.0] * 3, [1.0] * 3)
    np.testing.assert_array_equal(cut.pixels[0], preprocess(image, settings))
    assert (cut.total, len(cut.places), len(cut.marks)) == (9, 9, 0)
    with pytest.raises(BundleError, match="makes a picture of 5 x 6"):
        tiling_of({**WHOLE, "crop": {"height": 6, "width": 5}}).cut(image, 3)


def test_a_square_is_padded_on_both_sides() -> None:
    image = Image.new("RGB", (12, 6), (200, 200, 200))
    cut = tiling_of(SQUARE).cut(image, 0)
    assert cut.pixels.shape == (1, 6, 6, 3) and cut.pixels[0, 0, 0].tolist() == [1, 2, 3]
    assert cut.pixels[0, 3, 0].tolist() == [200, 200, 200]
    assert (cut.total, cut.marks.tolist()) == (10, [[9, -1, 0]])
    with pytest.raises(UserError, match="too long and thin to be made a square"):
        tiling_of(SQUARE).cut(Image.new("RGB", (20_000, 2)), 0)


def test_a_picture_beside_others_is_cut_otherwise_where_the_model_does() -> None:
    image = tiny.picture(2)
    assert len(tiling_of(NESTED).cut(image, 3).pixels) == 3
    assert len(tiling_of(NESTED, pictures=2).cut(image, 3).pixels) == 1
    assert len(tiling_of(ANYRES, pictures=2).cut(image, 3).pixels) == 3
    assert video_tiling_of(ANYRES) is None


def test_frames_are_halved_as_an_average_of_neighbours() -> None:
    tiling = video_tiling_of({**NESTED, "video": {"kind": "pooled", "tile": 8, "side": 4}})
    assert tiling is not None
    cut = tiling.cut_frames([tiny.picture(seed) for seed in (1, 2)], 3)
    assert cut.pixels.shape == (2, 8, 8, 3) and (cut.total, len(cut.places)) == (9, 8)
    tokens = np.arange(32.0)
    made = (tokens[cut.sources] * cut.weights).sum(1)
    whole = tokens.reshape(2, 2, 2, 2, 2).mean(axis=(2, 4)).ravel()  # even sides: the mean of each 2 x 2
    np.testing.assert_allclose(made, whole)
    assert cut.tile.tolist() == [0] * 4 + [1] * 4
    for budget, most in (("picture", 5), ("tile", 7)):
        assert tiling.frames(TilesInfo(1, 3, 7, 16, budget, 4), 20) == most  # type: ignore[arg-type]


def test_what_is_chosen_together_goes_to_its_picture() -> None:
    images = [tiny.picture(1), tiny.picture(2, (30, 30))]
    cuts = [tiling_of(ANYRES).cut(images[0], 3), tiling_of(SQUARE).cut(images[1], 3)]
    whole = joined(cuts, 9)
    counts = [len(cut.places) for cut in cuts]
    assert (len(whole.pixels), whole.total) == (4, sum(counts))
    assert whole.sources[counts[0] :, 0].tolist() == list(range(27, 36))  # after the 27 tokens of three tiles
    slots = lay_out(whole, TilesInfo(1, 2, 6, 9, "prompt", 1, pictures=2), 40)
    kept = np.array([[2, 5, counts[0], counts[0] + 8, 39]])  # the last is an empty slot
    features = np.arange(5, dtype=np.float32)[None, :, None] * np.ones(4, np.float32)
    scores = np.arange(40, dtype=np.float32)[None]
    levels = features[:, None] + np.array([10, 20], np.float32)[:, None, None]  # [1, 2, 5, 4]
    found = chosen(slots, features, kept, scores, whole.total, levels)
    first, second = parted(found, cuts)
    assert (first.kept.tolist(), second.kept.tolist()) == ([2, 5], [0, 8])
    assert (first.scores.tolist(), second.scores[0]) == (list(range(counts[0])), counts[0])
    made = pictured(cuts[1], second, embed, np.full((1, 4), -7, np.float32))
    assert made.span.kept.tolist() == [0, 8, 9] and np.asarray(made.features)[:, 0].tolist() == [2, 3, -7]
    assert made.deepstack is not None and made.deepstack[:, :, 0].tolist() == [[12, 13, 0], [22, 23, 0]]


def test_a_picture_may_lose_all_its_tokens() -> None:
    cuts = [tiling_of(SQUARE).cut(tiny.picture(seed), 3) for seed in (1, 2)]
    whole = joined(cuts, 9)
    slots = lay_out(whole, TilesInfo(1, 2, 2, 9, "prompt", 1, pictures=2), 18)
    found = chosen(slots, np.ones((1, 2, 4), np.float32), np.array([[0, 1]]), np.zeros((1, 18), np.float32), 18)
    made = [
        pictured(cut, part, embed, np.zeros((1, 4), np.float32))
        for cut, part in zip(cuts, parted(found, cuts), strict=True)
    ]
    assert [picture.span.kept.tolist() for picture in made] == [[0, 1, 9], []]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SQUARE, "side": 0}, "side of 1 or more"),
        ({**SQUARE, "background": [0]}, "three background values"),
        ({**WHOLE, "grid": [3]}, "grid below 1"),
        ({**WHOLE, "more": 1}, "more"),
        ({**SQUARE, "kind": "round"}, "'round' is not known"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=words):
        tiling_of(settings)
