"""A video as LLaVA-OneVision takes it: each frame a tile, its grid halved bilinearly, and one newline after the last.

As ``get_video_features`` of transformers' ``LlavaOnevisionModel`` does. All frames together are one picture of the
prompt, whose tokens are chosen by one SVD (or, with a budget for each tile, a frame at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from svdprune.runtime.errors import BundleError
from svdprune.runtime.fields import read_fields
from svdprune.runtime.tiling import Cut, TilesInfo, View
from svdprune.runtime.tiling.anyres import bilinear
from svdprune.runtime.tiling.squares import resized

if TYPE_CHECKING:
    from PIL import Image


def read(settings: dict[str, Any], file: str) -> Frames:
    """Check the fields.

    Raises:
        BundleError: naming the field.
    """
    tiling = read_fields(Frames, settings, file, "tiling.video")
    if min(tiling.tile, tiling.side) < 1:
        raise BundleError(f"{file}: tiling.video needs a tile and a side of 1 or more")
    return tiling


@dataclass(frozen=True)
class Frames:
    """See ``svdprune.runtime.tiling.VideoTiling``.

    Attributes:
        tile: pixels of a frame's side. side: tokens of it, before the grid is halved.
    """

    tile: int
    side: int

    @property
    def halved(self) -> int:
        """Tokens of a frame's side in the prompt."""
        return -(-self.side // 2)

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        return 4

    def frames(self, tiles: TilesInfo, tokens: int) -> int:
        """See ``VideoTiling``."""
        if tiles.budget == "tile":
            return tiles.most
        return min(tiles.most, tokens // self.halved**2)

    def cut_frames(self, images: Sequence[Image.Image], resample: int) -> Cut:
        """See ``VideoTiling``."""
        pixels = np.stack([np.asarray(resized(image, self.tile, self.tile, resample)) for image in images])
        low, high, share = bilinear(self.side, self.halved)
        index = np.arange(self.side**2, dtype=np.int64).reshape(self.side, self.side)
        sources = np.stack([index[y][:, x] for y in (low, high) for x in (low, high)], -1).reshape(-1, 4)
        weights = np.stack([y[:, None] * x for y in (1 - share, share) for x in (1 - share, share)], -1).reshape(-1, 4)
        count, each = len(images), len(sources)
        starts = self.side**2 * np.arange(count, dtype=np.int64)
        total = count * each
        return Cut(
            np.ascontiguousarray(pixels),
            (starts[:, None, None] + sources).reshape(total, 4),
            np.tile(weights.astype(np.float32), (count, 1)),
            np.repeat(np.arange(count, dtype=np.int64), each),
            np.arange(total, dtype=np.int64),
            np.array([[total, -1, 0]], np.int64),
            total + 1,
            [View(frame, (self.halved, self.halved), number * each) for number, frame in enumerate(pixels)],
        )
