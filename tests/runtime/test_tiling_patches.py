"""Pictures of any size in tiles of tokens: sizes, what a tile holds, and the limits that an engine is built for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.tiling import TilesInfo, Tiling, tiling_of
from svdprune.runtime.tiling.slots import lay_out

WINDOWS = {"kind": "patches", "patch": 2, "merge": 2, "side": 4, "min_pixels": 64, "max_pixels": 1600}
SINGLE = {**WINDOWS, "side": 1}


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("settings", [WINDOWS, SINGLE], ids=["windows", "single"])
def test_a_tile_holds_the_pixels_of_its_tokens(settings: dict[str, object]) -> None:
    cut = tiling_of(settings).cut(picture(37, 22), 3)
    (view,) = cut.views
    rows, columns = view.grid
    assert (rows, columns) == (6, 9) and view.pixels.shape == (24, 36, 3)
    side = int(str(settings["side"]))
    for index, (_, y, x) in enumerate(cut.positions if cut.positions is not None else []):
        tile, inside = divmod(int(cut.sources[index, 0]), side**2)
        top, left = (4 * place for place in divmod(inside, side))
        np.testing.assert_array_equal(
            cut.pixels[tile, top : top + 4, left : left + 4], view.pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        )
        origin = cut.extras["places"][tile]
        np.testing.assert_array_equal(origin[:2] + 2 * np.array(divmod(inside, side)), [2 * y, 2 * x])
        np.testing.assert_array_equal(origin[2:], [12, 18])
    assert (cut.total, cut.advance, len(cut.marks)) == (54, 9, 0)
    np.testing.assert_array_equal(cut.places, np.arange(54))


def test_tiles_at_the_edge_are_black_beyond_it() -> None:
    cut = tiling_of(WINDOWS).cut(picture(37, 22), 3)
    assert len(cut.pixels) == 6
    assert not cut.pixels[5, 8:].any() and not cut.pixels[5, :, 4:].any() and cut.pixels[5, :8, :4].any()


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize(("least", "most"), [(64, 1600), (64, 64), (16, 100_000), (3000, 4000), (1, 16)])
def test_no_picture_leaves_the_limits(side: int, least: int, most: int) -> None:
    tiling: Tiling = tiling_of({**WINDOWS, "side": side, "min_pixels": least, "max_pixels": most})
    low, likely, high = tiling.limits
    assert 1 <= low <= likely <= high
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(3000):
        long = math.exp(rng.uniform(0, math.log(8000)))
        sides = [max(1, round(long)), max(1, round(long / math.exp(rng.uniform(0, math.log(200)))))]
        height, width = rng.permutation(sides)
        if max(sides) > 200 * min(sides):
            continue
        rows, columns = tiling._grid(int(height), int(width))  # type: ignore[attr-defined]
        assert low <= tiling._tiles(rows, columns) <= high  # type: ignore[attr-defined]
        assert 1 <= rows * columns <= tiling.most_tokens
        seen.append(rows * columns)
    assert max(seen) > tiling.most_tokens / 2  # the limit is no idle one


def test_the_slots_carry_the_places_along() -> None:
    tiling = tiling_of(WINDOWS)
    cut = tiling.cut(picture(37, 22), 3)
    low, likely, high = tiling.limits
    slots = lay_out(cut, TilesInfo(low, likely, high, 16, "picture", extras={"places": [4]}), tiling.most_tokens)
    assert slots.extras["places"].shape == (6, 4)
    assert (slots.candidates[0] >= 0).sum() == 54


def test_a_thread_is_refused() -> None:
    with pytest.raises(UserError, match="1 to 200 at most"):
        tiling_of(WINDOWS).cut(picture(401, 2), 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"side": 0}, "tiling.side is 0"), ({"max_pixels": 10}, "tiling.max_pixels is 10"), ({"more": 1}, "tiling.more")],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        tiling_of({**WINDOWS, **changes})
