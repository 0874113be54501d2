"""A picture as one tile, prepared as by processors that do not cut: for choices over the pictures of a whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.preprocess import ImageSettings, preprocess
from svdprune.runtime.tiling import Cut, View

if TYPE_CHECKING:
    from PIL import Image


def read(settings: dict[str, Any], file: str) -> Whole:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(Whole, settings, file, "tiling")
    if min(tiling.height, tiling.width, *tiling.grid) < 1 or len(tiling.grid) != 2:
        raise BundleError(f"{file}: tiling has height, width or grid below 1: export the bundle again")
    return tiling


@dataclass(frozen=True)
class Whole:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        height, width: of the prepared picture, pixels. grid: rows and columns of its tokens.
        resize, crop: as of ``ImageSettings``.
    """

    height: int
    width: int
    grid: list[int]
    resize: dict[str, int] | None = None
    crop: dict[str, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return self.height, self.width, self.most_tokens

    @property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return 1, 1, 1

    @property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        return self.grid[0] * self.grid[1]

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 1

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: none."""
        return 0

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        settings = ImageSettings(self.resize, resample, self.crop, 1.0, [0.0] * 3, [1.0] * 3)
        pixels = preprocess(image, settings)[None]
        if pixels.shape[1:3] != (self.height, self.width):
            raise BundleError(
                f"the processor makes a picture of {pixels.shape[2]} x {pixels.shape[1]}, the vision graph takes "
                f"{self.width} x {self.height}: export the bundle again"
            )
        rows, columns = self.grid
        tokens = self.most_tokens
        index = np.arange(tokens, dtype=np.int64)
        return Cut(
            pixels,
            index[:, None],
            np.ones((tokens, 1), np.float32),
            np.zeros(tokens, np.int64),
            index,
            np.zeros((0, 3), np.int64),
            tokens,
            [View(pixels[0], (rows, columns), 0)],
        )
