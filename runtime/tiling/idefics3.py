"""Tiles of Idefics3 and SmolVLM: the picture enlarged to whole tiles, then all of it small in one more.

Cut as by transformers' ``Idefics3ImageProcessorPil`` and ``SmolVLMImageProcessorPil`` (one picture, so nothing is
padded), with the tokens that the two processors write around the tiles as marks: what stands before a tile says its row
and column and goes when the tile keeps no token; a newline ends a row of tiles; one token closes the picture.
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
LARGEST = 4096  # pixels of the longest edge, whatever the settings say
ALWAYS = -1


def read(settings: dict[str, Any], file: str) -> Idefics3:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(Idefics3, settings, file, "tiling")
    if min(tiling.tile, tiling.side, tiling.longest) < 1:
        raise BundleError(f"{file}: tiling.tile, .side and .longest must be 1 or more: export the bundle again")
    across = tiling.across if tiling.split and tiling.across > 1 else 0
    if len(tiling.cells) < across or any(len(row) < across for row in tiling.cells):
        raise BundleError(f"{file}: tiling.cells has no tokens for a grid of {across} x {across} tiles")
    return tiling


@dataclass(frozen=True)
class Idefics3:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        tile: pixels of a tile's side. side: tokens of a tile's side.
        longest: pixels that the picture's longer edge is resized to. split: whether it is cut into tiles at all.
        cells: ids before the tile of each row and column. line: ids after a row of tiles that is not the last.
        whole: ids before the tile of the picture as a whole, which follows the last row. alone: those where there is no
            other tile. end: ids after the last tile.
    """

    tile: int
    side: int
    longest: int
    split: bool
    cells: list[list[list[int]]]
    line: list[int]
    whole: list[int]
    alone: list[int]
    end: list[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return self.tile, self.tile, self.side**2

    @property
    def across(self) -> int:
        """The most tiles on an edge: the shorter one is rounded up to an even number and may become the longer."""
        return -(-min(self.longest + self.longest % 2, LARGEST) // self.tile)

    @cached_property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``; the likely number is that of a picture of 640 x 480."""
        if not self.split:
            return 1, 1, 1
        long = -(-min(self.longest, LARGEST) // self.tile)
        return _with_whole(long), _with_whole(math.prod(self._grid(*COMMON))), _with_whole(self.across**2)

    @property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        return self.limits[2] * self.side**2

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: what stands before each kept tile and after its row, and at the end."""
        tiles, lines = min(kept, self.limits[2]), min(kept, self.across)
        before = max((len(ids) for row in self.cells for ids in row), default=0)
        return tiles * before + lines * len(self.line) + max(len(self.whole), len(self.alone)) + len(self.end)

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 1

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        large = _whole_tiles(*_limited(*_longest(height, width, self.longest)), self.tile)
        return large[0] // self.tile, large[1] // self.tile

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        image = resized(image, *_limited(*_longest(image.height, image.width, self.longest)), resample)
        if self.split:
            image = resized(image, *_whole_tiles(image.height, image.width, self.tile), resample)
        rows, columns = (image.height // self.tile, image.width // self.tile) if self.split else (1, 1)
        cells = rows * columns if rows * columns > 1 else 0
        single = self.split and not cells  # the picture is one tile already
        pixels = tiles_of(image if single else resized(image, self.tile, self.tile, resample), self.tile)
        views = [View(pixels[0], (self.side, self.side), cells * self.side**2)]
        if cells:
            pixels = np.concatenate([tiles_of(image, self.tile), pixels])
            grid = (rows * self.side, columns * self.side)
            views.insert(0, View(np.asarray(image), grid, 0, (rows, columns)))
        starts, marks, total = self._rows(rows, columns, cells > 0)
        return cut_of(pixels, self.side, starts, marks, total, views)

    def _rows(self, rows: int, columns: int, split: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """Where the tiles begin, the marks, and the number of rows."""
        starts: list[int] = []
        marks: list[tuple[int, int, int]] = []
        at = 0

        def tile(before: list[int]) -> int:
            """The marks before a tile, which stay when it keeps a token, and the tile; where it ends."""
            first = at + len(before)
            starts.append(first)
            after = first + self.side**2
            marks.extend((at + i, token, after - 1) for i, token in enumerate(before))
            return after

        for row in range(rows if split else 0):
            line = at
            for column in range(columns):
                at = tile(self.cells[row][column])
            if row < rows - 1:
                marks.extend((at + i, token, line) for i, token in enumerate(self.line))
                at += len(self.line)
        at = tile(self.whole if split else self.alone)
        marks.extend((at + i, token, ALWAYS) for i, token in enumerate(self.end))
        return np.array(starts, np.int64), np.array(marks, np.int64).reshape(-1, 3), at + len(self.end)


def _with_whole(tiles: int) -> int:
    """Tiles of a grid, and one of the picture as a whole beside several."""
    return tiles if tiles == 1 else tiles + 1


def _longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width where the longer edge is ``longest`` and the other even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(height, 1), max(width, 1)


def _limited(height: int, width: int) -> tuple[int, int]:
    """Height and width, made smaller where an edge is longer than ``LARGEST``."""
    ratio = width / height
    if width >= height and width > LARGEST:
        width, height = LARGEST, int(LARGEST / ratio)
    elif height > width and height > LARGEST:
        width, height = int(LARGEST * ratio), LARGEST
    return max(height, 1), max(width, 1)


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width in whole tiles: the longer edge rounded up first, and the other with it."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width
