"""A picture that LLaVA-OneVision is shown beside others: padded to a square, one tile, and a newline after it.

As transformers' ``LlavaOnevisionImageProcessorPil`` does for a sample of several pictures (``batch_num_images`` above
1), and ``pack_image_features`` for a picture of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.preprocess import MAX_PIXELS
from svdprune.runtime.tiling import Cut, View
from svdprune.runtime.tiling.squares import cut_of, resized

if TYPE_CHECKING:
    from PIL import Image


def read(settings: dict[str, Any], file: str) -> Square:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(Square, settings, file, "tiling.several")
    if min(tiling.tile, tiling.side) < 1 or len(tiling.background) != 3:
        raise BundleError(f"{file}: tiling.several needs a tile and a side of 1 or more, and three background values")
    return tiling


@dataclass(frozen=True)
class Square:
    """See ``svdprune.runtime.tiling.Tiling``.

    Attributes:
        tile: pixels of the square's side. side: tokens of it.
        background: red, green and blue (0 to 255) of the padding.
    """

    tile: int
    side: int
    background: list[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return self.tile, self.tile, self.most_tokens

    @property
    def limits(self) -> tuple[int, int, int]:
        """See ``Tiling``."""
        return 1, 1, 1

    @property
    def most_tokens(self) -> int:
        """See ``Tiling``."""
        return self.side**2

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 1

    def marks_with(self, kept: int) -> int:
        """See ``Tiling``: the newline."""
        return min(kept, 1)

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """See ``Tiling``."""
        from PIL import Image as Pillow

        width, height = image.size
        longest = max(width, height)
        if longest**2 > MAX_PIXELS:
            raise UserError(
                f"the picture is {width:,} x {height:,}, too long and thin to be made a square: crop it first"
            )
        padded = Pillow.new("RGB", (longest, longest), tuple(self.background))
        padded.paste(image, ((longest - width) // 2, (longest - height) // 2))
        pixels = np.asarray(resized(padded, self.tile, self.tile, resample))[None]
        tokens = self.most_tokens
        newline = np.array([[tokens, -1, 0]], np.int64)
        views = [View(pixels[0], (self.side, self.side), 0)]
        return cut_of(np.ascontiguousarray(pixels), self.side, np.zeros(1, np.int64), newline, tokens + 1, views)
