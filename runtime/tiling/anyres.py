"""Tiles of LLaVA-NeXT and LLaVA-OneVision: the picture small as a whole, and enlarged on the best of some grids.

Cut as by transformers' ``LlavaNextImageProcessorPil`` and ``LlavaOnevisionImageProcessorPil``, and packed as by
``pack_image_features`` of the two models: the tokens of the first tile, then the grid's tokens line by line without
those of the padding, each line with a newline. OneVision resamples a grid of too many tokens, bilinearly.
"""

from __future__ import annotations

import math
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
SLACK = 1.1  # a grid is resampled where its sides are longer than this times what they may be


def read(settings: dict[str, Any], file: str) -> AnyRes:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(AnyRes, settings, file, "tiling")
    bad = [
        pair
        for pair in tiling.pinpoints
        if len(pair) != 2 or min(pair) < tiling.tile or any(s % tiling.tile for s in pair)
    ]
    if tiling.tile < 1 or tiling.side < 1 or not tiling.pinpoints or bad:
        raise BundleError(f"{file}: tiling.pinpoints must be pairs of multiples of tiling.tile, not {bad or 'empty'}")
    return tiling


@dataclass(frozen=True)
class AnyRes:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        tile: pixels of a tile's side. side: tokens of a tile's side.
        pinpoints: [height, width] of the grids to choose from, pixels.
        pool_above: the grid may have about this many tiles' tokens, more are resampled to as many; None for no limit.
    """

    tile: int
    side: int
    pinpoints: list[list[int]]
    pool_above: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return self.tile, self.tile, self.side**2

    @cached_property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``; the likely number is that of a picture of 640 x 480."""
        counts = [self._tiles(pair) for pair in self.pinpoints]
        return min(counts), self._tiles(self._best(*COMMON)), max(counts)

    @property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        grid = (self.limits[2] - 1) * self.side**2
        if self.pool_above is not None:
            grid = min(grid, int(SLACK**2 * self.pool_above * self.side**2))
        return self.side**2 + grid

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: one a line, of those of the highest grid."""
        return min(kept, max(pair[0] for pair in self.pinpoints) // self.tile * self.side)

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        limit = math.inf if self.pool_above is None else SLACK**2 * self.pool_above
        return 1 if self.limits[2] - 1 <= limit else 4

    def _tiles(self, pair: list[int]) -> int:
        return 1 + (pair[0] // self.tile) * (pair[1] // self.tile)

    def _best(self, height: int, width: int) -> list[int]:
        """The grid that keeps most of the picture's pixels, and of those the one with the least padding."""
        best, most, least = self.pinpoints[0], 0, math.inf
        for pair in self.pinpoints:
            scale = min(pair[1] / width, pair[0] / height)
            used = min(int(width * scale) * int(height * scale), width * height)
            spare = pair[0] * pair[1] - used
            if used > most or (used == most and spare < least):
                best, most, least = pair, used, spare
        return best

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        from PIL import Image as Pillow

        filter_ = Pillow.Resampling(resample)
        width, height = image.size
        best = self._best(height, width)
        small = np.asarray(image.resize((self.tile, self.tile), filter_))
        large, box = _fitted(image, best, filter_)
        rows, columns = best[0] // self.tile, best[1] // self.tile
        pixels = np.concatenate([small[None], tiles_of(large, self.tile)])
        index = self._index(rows, columns)
        index = _unpadded(index, height, width)  # [lines, per line]
        sources, weights = self._resampled(index)
        lines, across = sources.shape[:2]
        count, base = sources.shape[2], self.side**2
        whole = np.zeros((base, count), np.int64)
        whole[:, 0] = np.arange(base)
        sharp = np.zeros((base, count), np.float32)
        sharp[:, 0] = 1
        starts = base + np.arange(lines, dtype=np.int64) * (across + 1)
        flat, shares = sources.reshape(-1, count), weights.reshape(-1, count)
        nearest = flat[np.arange(len(flat)), shares.argmax(1)]
        marks = np.stack([starts + across, np.full(lines, -1), starts], 1)
        top, left, bottom, right = box
        views = [View(small, (self.side, self.side), 0)]
        if lines and across:
            views.append(View(large[top:bottom, left:right], (lines, across), base))
        return Cut(
            pixels,
            np.concatenate([whole, flat]),
            np.concatenate([sharp, shares]),
            np.concatenate([np.zeros(base, np.int64), nearest // base]),
            np.concatenate([np.arange(base), (starts[:, None] + np.arange(across)).ravel()]),
            marks.astype(np.int64),
            base + lines * (across + 1),
            views,
        )

    def _index(self, rows: int, columns: int) -> np.ndarray:
        """Index of each token of the grid among those of all tiles, int64 [rows * side, columns * side]."""
        tiles = self.side**2 * (1 + np.arange(rows * columns, dtype=np.int64).reshape(rows, 1, columns, 1))
        inside = np.arange(self.side**2, dtype=np.int64).reshape(1, self.side, 1, self.side)
        return (tiles + inside).reshape(rows * self.side, columns * self.side)

    def _resampled(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources int64 and weights float32 [lines, per line, R] of the grid, made smaller where it has too many."""
        height, width = index.shape
        ratio = 0.0 if self.pool_above is None else math.sqrt(height * width / (self.pool_above * self.side**2))
        count = self.most_sources
        if ratio <= SLACK:
            sources = np.zeros((height, width, count), np.int64)
            weights = np.zeros((height, width, count), np.float32)
            sources[..., 0], weights[..., 0] = index, 1
            return sources, weights
        size = int(height // ratio), int(width // ratio)
        if 0 in size:
            raise UserError("the picture is too long and thin for this model: crop it first")
        (low_y, high_y, share_y), (low_x, high_x, share_x) = (
            bilinear(old, new) for old, new in zip((height, width), size, strict=True)
        )
        sources = np.stack([index[y][:, x] for y in (low_y, high_y) for x in (low_x, high_x)], -1)
        weights = np.stack([y[:, None] * x for y in (1 - share_y, share_y) for x in (1 - share_x, share_x)], -1)
        return sources, weights.astype(np.float32)


def _fitted(image: Image.Image, size: list[int], resample: Any) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The picture enlarged to fit [height, width], black around; and where it lies: top, left, bottom, right."""
    width, height = image.size
    across, down = size[1] / width, size[0] / height
    if across < down:
        new = (size[1], min(math.ceil(height * across), size[0]))
    else:
        new = (min(math.ceil(width * down), size[1]), size[0])
    left, top = (size[1] - new[0]) // 2, (size[0] - new[1]) // 2
    canvas = np.zeros((size[0], size[1], 3), np.uint8)
    canvas[top : top + new[1], left : left + new[0]] = np.asarray(image.resize(new, resample))
    return canvas, (top, left, top + new[1], left + new[0])


def _unpadded(index: np.ndarray, height: int, width: int) -> np.ndarray:
    """The part of the grid that the picture of ``height`` x ``width`` covers, as transformers' ``unpad_image``."""
    rows, columns = index.shape
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return index[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return index[:, padding : columns - padding]


def bilinear(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of ``new`` places: the two of ``old`` that it lies between, and the share of the second (no corners)."""
    centres = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(centres.astype(np.int64), old - 1)
    return low, np.minimum(low + 1, old - 1), centres - low
