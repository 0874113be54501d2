"""Tiles of InternVL: the picture stretched to the grid of tiles whose shape is nearest to its own, then as a whole.

Cut as by transformers' ``GotOcr2ImageProcessorPil`` with ``crop_to_patches``, as ``InternVLProcessor`` asks it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.tiling import Cut, View
from svdprune.runtime.tiling.squares import cut_of, resized, tiles_of

if TYPE_CHECKING:
    from PIL import Image

COMMON = (480, 640)  # height and width of a picture as they come


def read(settings: dict[str, Any], file: str) -> InternVL:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(InternVL, settings, file, "tiling")
    if min(tiling.tile, tiling.side, tiling.least) < 1 or tiling.most < tiling.least:
        raise BundleError(f"{file}: tiling has sizes below 1, or a `most` below its `least`: export the bundle again")
    return tiling


@dataclass(frozen=True)
class InternVL:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        tile: pixels of a tile's side. side: tokens of a tile's side.
        least, most: tiles of the grid; where there are several, the picture as a whole is one more.
    """

    tile: int
    side: int
    least: int
    most: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return self.tile, self.tile, self.side**2

    @cached_property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``; the likely number is that of a picture of 640 x 480."""
        return _with_whole(self.least), _with_whole(math.prod(self._best(*COMMON))), _with_whole(self.most)

    @property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        return self.limits[2] * self.side**2

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: there are none."""
        return 0

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 1

    @cached_property
    def _grids(self) -> list[tuple[int, int]]:
        """(columns, rows), those of few tiles first; among equals the narrow ones first."""
        sides = range(1, self.most + 1)
        grids = [(x, y) for x in sides for y in sides if self.least <= x * y <= self.most]
        return sorted(grids, key=math.prod)

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """The grid of nearest shape; of equally near ones the largest of which the picture fills more than half."""
        best, least = (1, 1), math.inf
        for grid in self._grids:
            apart = abs(width / height - grid[0] / grid[1])
            large = width * height > 0.5 * self.tile * self.tile * grid[0] * grid[1]
            if apart < least or (apart == least and large):
                best, least = grid, apart
        return best

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        columns, rows = self._best(image.height, image.width)
        large = resized(image, rows * self.tile, columns * self.tile, resample)
        pixels = tiles_of(large, self.tile)
        count, per_tile = len(pixels), self.side**2
        views = [View(np.asarray(large), (rows * self.side, columns * self.side), 0, (rows, columns))]
        if count > 1:
            small = np.asarray(resized(image, self.tile, self.tile, resample))
            pixels = np.concatenate([pixels, small[None]])
            views.append(View(small, (self.side, self.side), count * per_tile))
        starts = np.arange(len(pixels), dtype=np.int64) * per_tile
        return cut_of(pixels, self.side, starts, np.zeros((0, 3), np.int64), len(pixels) * per_tile, views)


def _with_whole(tiles: int) -> int:
    """Tiles of a grid, and one of the picture as a whole beside several."""
    return tiles if tiles == 1 else tiles + 1
