"""What tilings share: cutting into square tiles, and cuts whose candidates are all tokens of all tiles in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.tiling import Cut, View

if TYPE_CHECKING:
    from PIL import Image


def resized(image: Image.Image, height: int, width: int, resample: int) -> Image.Image:
    """The picture at another size; Pillow copies it where that is its own."""
    from PIL import Image as Pillow

    return image.resize((width, height), Pillow.Resampling(resample))


def tiles_of(image: Image.Image | np.ndarray, tile: int) -> np.ndarray:
    """The tiles uint8 [N, tile, tile, 3] of a picture (an array: uint8 [h, w, 3]) that holds whole ones, row by row."""
    pixels: Any = np.asarray(image)
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    parts = pixels.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    return np.ascontiguousarray(parts.reshape(-1, tile, tile, 3))


def cut_of(pixels: np.ndarray, side: int, starts: np.ndarray, marks: np.ndarray, total: int, views: list[View]) -> Cut:
    """The cut of N tiles of side * side tokens each, of which the first of each has the place in ``starts`` [N]."""
    count, per_tile = len(pixels), side**2
    tokens = np.arange(count * per_tile, dtype=np.int64)
    return Cut(
        pixels,
        tokens[:, None],
        np.ones((len(tokens), 1), np.float32),
        tokens // per_tile,
        (starts[:, None] + np.arange(per_tile)).ravel(),
        marks,
        total,
        views,
    )
