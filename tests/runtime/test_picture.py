"""The kept-token picture shows what it says: dimmed and kept patches, colours in the order of the scores."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from svdprune.runtime import picture
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.picture import MIN_PATCH, inferno, kept_picture, save_picture


def _panels(image, rows, columns, patch):
    """The two panels of a sheet, found by the known geometry: the gap is twice the unit of text."""
    width, height = columns * patch, rows * patch
    unit = max(13, round(width / 34))
    gap, top = 2 * unit, 2 * unit + round(unit * 2.4)
    pixels = np.asarray(image).astype(int)
    left = pixels[top : top + height, gap : gap + width]
    right = pixels[top : top + height, 2 * gap + width : 2 * gap + 2 * width]
    return left, right


def _centre(panel, row, column, patch):
    return panel[row * patch + patch // 2, column * patch + patch // 2]


def test_dropped_patches_are_dimmed_and_kept_ones_are_not():
    rows, columns, patch = 4, 6, MIN_PATCH
    pixels = np.full((rows * 10, columns * 10, 3), (200, 100, 40), np.uint8)  # 10 pixels a patch: enlarged twice
    scores = np.arange(24.0)
    kept = np.array([3, 7, 23])
    left, right = _panels(kept_picture(pixels, scores, kept, (rows, columns)), rows, columns, patch)
    for token in range(24):
        color = _centre(left, *divmod(token, columns), patch)
        if token in kept:
            assert np.abs(color - (200, 100, 40)).max() <= 1
        else:
            assert color.max() < 100
    # the heat map is the scores' order, brighter is higher, and its ends are the colour map's ends
    light = [_centre(right, *divmod(token, columns), patch).sum() for token in range(24)]
    assert light == sorted(light)
    assert tuple(_centre(right, 0, 0, patch)) == (0, 0, 4)
    assert tuple(_centre(right, 3, 5, patch)) == (252, 255, 164)


def test_kept_patches_are_outlined_in_both_panels():
    rows = columns = 3
    patch = MIN_PATCH
    pixels = np.full((30, 30, 3), 128, np.uint8)
    panels = _panels(kept_picture(pixels, np.ones(9), np.array([4]), (rows, columns)), rows, columns, patch)
    for panel in panels:
        assert tuple(panel[patch, patch + patch // 2]) == picture._EDGE
        assert tuple(panel[2, patch // 2]) != picture._EDGE


@pytest.mark.parametrize("shape", [(336, 336, (24, 24)), (100, 37, (7, 3)), (20, 500, (2, 50)), (1, 1, (1, 1))])
def test_patches_are_large_enough_to_see(shape):
    height, width, grid = shape
    tokens = grid[0] * grid[1]
    image = kept_picture(np.zeros((height, width, 3), np.uint8), np.ones(tokens), np.arange(tokens), grid)
    assert image.width >= 2 * MIN_PATCH * grid[1] and image.height >= MIN_PATCH * grid[0]


def test_equal_scores_and_no_kept_token_are_drawable():
    kept_picture(np.zeros((8, 8, 3), np.uint8), np.zeros(4), np.array([], np.int64), (2, 2))


def test_a_caption_makes_room_for_itself_and_is_wrapped():
    arguments = (np.zeros((60, 60, 3), np.uint8), np.ones(9), np.arange(2), (3, 3))
    bare, short = kept_picture(*arguments), kept_picture(*arguments, caption="Why?\nBecause.")
    long = kept_picture(*arguments, caption="word " * 60)
    assert bare.height < short.height < long.height
    assert bare.width == short.width == long.width


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixels": np.zeros((8, 8, 3), np.float32)}, "pixels must be uint8"),
        ({"pixels": np.zeros((8, 8), np.uint8)}, "pixels must be uint8"),
        ({"scores": np.ones(5)}, "needs 4 scores"),
        ({"kept_indices": np.array([4])}, "from 0 to 3"),
        ({"kept_indices": np.array([-1])}, "from 0 to 3"),
        ({"kept_indices": np.array([0.5])}, "whole numbers"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, said):
    good = {
        "pixels": np.zeros((8, 8, 3), np.uint8),
        "scores": np.ones(4),
        "kept_indices": np.array([0]),
        "grid": (2, 2),
    }
    with pytest.raises(UserError, match=said):
        kept_picture(**{**good, **change})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(NumericalError, match="NaN or infinite"):
        kept_picture(np.zeros((8, 8, 3), np.uint8), np.array([0, 1, bad, 2]), np.array([0]), (2, 2))


def test_the_colour_map_is_dark_to_light():
    colors = inferno(np.linspace(-0.5, 1.5, 200)).astype(int)
    light = colors @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(light) >= -0.5).all()
    assert inferno(np.zeros((2, 3))).shape == (2, 3, 3)


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    image = Image.new("RGB", (4, 4))
    save_picture(image, tmp_path / "kept.png")
    save_picture(image, tmp_path / "kept.JPG")
    with Image.open(tmp_path / "kept.png") as again:
        assert again.size == (4, 4)
    (tmp_path / "old.png").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_picture(image, tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.JPG", "kept.png", "old.png"]


@pytest.mark.parametrize(("name", "said"), [("kept.txt", "suffix"), ("kept", "suffix"), ("no/kept.png", "no folder")])
def test_places_that_cannot_hold_a_picture(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / name)
