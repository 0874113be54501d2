"""Pictures of any size, as Qwen2.5-VL and Qwen3-VL take them: a whole number of tokens, cut into small tiles.

Resized as by transformers' ``Qwen2VLImageProcessorPil``. A tile is a square of ``side`` x ``side`` tokens (the
window in which Qwen2.5-VL's layers attend; one token for Qwen3-VL), so the number of tiles varies with the picture.
Tiles at the right and bottom edge are filled up with black, which the vision graph keeps out of all attention and which
is no candidate: its input ``places`` says where each tile lies and where the picture ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.tiling import Cut, View
from svdprune.runtime.tiling.squares import tiles_of

if TYPE_CHECKING:
    from PIL import Image

COMMON = (480, 640)  # height and width of a picture as they come
LONGEST = 200  # the processor refuses pictures whose sides have a larger ratio
PLACES = "places"  # the input float32 [N, 4]: the row and column of a tile's first patch, and the picture's patches


def read(settings: dict[str, Any], file: str) -> Patches:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(Patches, settings, file, "tiling")
    for name in ("patch", "merge", "side", "min_pixels"):
        if getattr(tiling, name) < 1:
            raise BundleError(f"{file}: tiling.{name} is {getattr(tiling, name)}, it must be 1 or more")
    if tiling.max_pixels < max(tiling.min_pixels, tiling.token**2):
        raise BundleError(
            f"{file}: tiling.max_pixels is {tiling.max_pixels}, it must be at least min_pixels ({tiling.min_pixels}) "
            f"and one token ({tiling.token**2})"
        )
    return tiling


@dataclass(frozen=True)
class Patches:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        patch: pixels of a patch's side. merge: patches of a token's side. side: tokens of a tile's side.
        min_pixels, max_pixels: of a picture after resizing, about.
    """

    patch: int
    merge: int
    side: int
    min_pixels: int
    max_pixels: int

    @property
    def token(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        tile = self.token * self.side
        return tile, tile, self.side**2

    @cached_property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``; the likely number is that of a picture of 640 x 480."""
        likely = self._tiles(*self._grid(*COMMON))
        most = max(self._tiles(rows, columns) for rows, columns in self._widest())
        return self._fewest(), likely, max(likely, most)

    @cached_property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        return max(rows * columns for rows, columns in self._widest())

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: there are none."""
        return 0

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 1

    def _tiles(self, rows: int, columns: int) -> int:
        return -(-rows // self.side) * -(-columns // self.side)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens: transformers' ``smart_resize``."""
        factor = self.token
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            high = max(factor, math.floor(height / shrink / factor) * factor)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
        elif high * wide < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * stretch / factor) * factor
            wide = math.ceil(width * stretch / factor) * factor
        return high // factor, wide // factor

    def _widest(self) -> Iterator[tuple[int, int]]:
        """For each number of rows, the most columns that a picture can have: no grid of a picture is larger.

        Of the processor's three cases: a size that is rounded, at most ``max_pixels``; one shrunk to them and rounded
        down, where a side of less than a token still gets one; one stretched to ``min_pixels`` and rounded up.
        """
        least, most = self.min_pixels / self.token**2, self.max_pixels / self.token**2  # tokens
        for rows in range(1, max(2, math.isqrt(int(most)) + 2)):
            columns = [1, int(min(most / rows, LONGEST * (rows + 0.5) + 0.5))]
            # The short side before it is rounded, in tokens: at least the thinnest picture's.
            shrunk = max(rows if rows > 1 else 0, math.sqrt(most / LONGEST))
            if shrunk < rows + 1:
                columns.append(int(most / shrunk))
            stretched = max(rows - 1, math.sqrt(least / LONGEST))
            if stretched <= rows:
                columns.append(math.ceil(least / stretched))
            yield rows, max(columns)

    def _fewest(self) -> int:
        """No picture has fewer: ``min_pixels`` fill them, or the quarter that rounding leaves of ``max_pixels``."""
        tokens = math.ceil(min(self.min_pixels, self.max_pixels / 4) / self.token**2)
        return min(-(-tokens // self.side**2), self._tiles(*self._grid(*COMMON)))

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        from PIL import Image as Pillow

        width, height = image.size
        if max(height, width) > LONGEST * min(height, width):
            raise UserError(
                f"the picture is {width:,} x {height:,}: its sides may be 1 to {LONGEST} at most, crop it first"
            )
        rows, columns = self._grid(height, width)
        size = (columns * self.token, rows * self.token)
        whole = np.asarray(image.resize(size, Pillow.Resampling(resample)))
        down, across = -(-rows // self.side), -(-columns // self.side)  # tiles
        tile = self.token * self.side
        canvas = np.zeros((down * tile, across * tile, 3), np.uint8)
        canvas[: size[1], : size[0]] = whole
        y, x = (axis.ravel() for axis in np.mgrid[:rows, :columns])
        number = (y // self.side) * across + x // self.side
        inside = (y % self.side) * self.side + x % self.side
        origins = np.stack([axis.ravel() for axis in np.mgrid[:down, :across]], 1) * (self.side * self.merge)
        ends = np.broadcast_to(np.array([rows, columns]) * self.merge, origins.shape)
        return Cut(
            tiles_of(canvas, tile),
            (number * self.side**2 + inside).astype(np.int64)[:, None],
            np.ones((len(y), 1), np.float32),
            number.astype(np.int64),
            np.arange(len(y)),
            np.zeros((0, 3), np.int64),
            len(y),
            views=[View(whole, (rows, columns), 0)],
            extras={PLACES: np.concatenate([origins, ends], 1).astype(np.float32)},
            positions=np.stack([np.zeros_like(y), y, x], 1).astype(np.int64),
            advance=max(rows, columns),
        )
