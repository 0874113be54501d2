"""A picture as several tiles: how it is cut, which tokens come of it, and the rows that they make in the prompt.

A *tiling* is one way to do it, as one kind of Hugging Face processor does; it is chosen by the field ``tiling.kind`` of
``processor/image.json``. It gives a ``Cut``: the tiles, and for each *candidate* - a token that the unpruned prompt
would hold - where it comes from. Everything after that (``slots``: what the vision graph takes; ``sequence``: the
rows of the prompt) is the same for all tilings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from svdprune.runtime.errors import BundleError
from svdprune.runtime.registry import Registry

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class TilesInfo:
    """``vision.tiles`` of the manifest: all tiles of a picture are one batch of the vision graph.

    Attributes:
        least, likely, most: tiles of a picture.
        per_tile: tokens of a tile, rows times columns of ``vision.grid``.
        budget: ``picture``: ``vision.keep`` tokens of the whole picture, by one SVD over all of them; ``tile``: that
            many of each tile, by one SVD a tile; ``prompt``: of all pictures of the prompt together, by one SVD over
            the tokens of all of them.
        sources: the most encoder tokens that one candidate is made of (4 where the picture's grid is resampled).
        marks: file of rows float32 [E, H] that stand between the tokens, such as a learned newline; null for none.
        pictures: how many pictures one run of the graph takes at most; more than 1 with the budget ``prompt``, whose
            other numbers are of all of them together.
        extras: more inputs of the vision graph by name, float32 [N, *rest] for N tiles, with their ``rest``.
    """

    least: int
    likely: int
    most: int
    per_tile: int
    budget: Literal["picture", "tile", "prompt"]
    sources: int = 1
    marks: str | None = None
    pictures: int = 1
    extras: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A part of the picture whose candidates lie on a grid, for drawing.

    Attributes:
        pixels: uint8 [h, w, 3]. grid: rows and columns. first: index of its first candidate.
        tiles: rows and columns of tiles in it; the candidates follow tile by tile, and row by row in each.
    """

    pixels: np.ndarray
    grid: tuple[int, int]
    first: int
    tiles: tuple[int, int] = (1, 1)

    def part(self, scores: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all candidates' scores [n] and the kept ones, int64 [k]: this grid's, row by row."""
        (rows, columns), (down, across) = self.grid, self.tiles
        index = self.first + np.arange(rows * columns).reshape(down, across, rows // down, columns // across)
        own = index.swapaxes(1, 2).ravel()
        return scores[own], np.flatnonzero(np.isin(own, kept))


@dataclass(frozen=True)
class Cut:
    """A picture cut into N tiles of T tokens, and its n candidates in the order of the prompt.

    Attributes:
        pixels: uint8 [N, h, w, 3].
        sources: int64 [n, R], indices among the N * T tokens; weights: float32 [n, R], which sum to 1. A candidate is
            the weighted sum of its sources, after the projector as before it.
        tile: int64 [n], the tile that each candidate belongs to, when the budget is a tile's.
        places: int64 [n], ascending, its row among the ``total`` rows that the unpruned picture has in the prompt.
        marks: int64 [M, 3], what stands at the other rows: (row, code, since). ``code`` is a token's id, or -1 - e for
            row e of the bundle's marks. A mark is kept when a candidate with a place between ``row`` and ``since`` is,
            ``since`` itself included, and always where that is -1. What ends a line names its first row, what begins a
            tile names its last.
        total: rows in the unpruned prompt.
        views: for drawing.
        extras: more inputs of the vision graph, by name: float32 [N, ...].
        positions: for decoders with positions of three axes: int64 [n, 3], the (time, row, column) of each candidate
            counted from the position of the picture's first row; None for others.
        advance: how far the text after the unpruned picture is from the picture's first row then; None for others.
    """

    pixels: np.ndarray
    sources: np.ndarray
    weights: np.ndarray
    tile: np.ndarray
    places: np.ndarray
    marks: np.ndarray
    total: int
    views: list[View] = field(default_factory=list)
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray | None = None
    advance: int | None = None


class Tiling(Protocol):
    """One way to cut pictures, made from the fields of ``image.json``'s ``tiling``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height and width of a tile in pixels, and its tokens."""
        ...

    @property
    def limits(self) -> tuple[int, int, int]:
        """The least, likely and greatest number of tiles of a picture."""
        ...

    @property
    def most_tokens(self) -> int:
        """The most candidates that a picture can have."""
        ...

    def marks_with(self, kept: int) -> int:
        """The most marks that stay where ``kept`` candidates do."""
        ...

    @property
    def most_sources(self) -> int:
        """R, the most tokens that a candidate is made of."""
        ...

    def cut(self, image: Image.Image, resample: int) -> Cut:
        """Cut an RGB picture; ``resample`` is Pillow's filter code.

        Raises:
            UserError: a picture that it cannot cut.
        """
        ...


class VideoTiling(Protocol):
    """One way to make a single picture of a video's frames, made from the fields of ``tiling.video``."""

    @property
    def most_sources(self) -> int:
        """See ``Tiling``."""
        ...

    def frames(self, tiles: TilesInfo, tokens: int) -> int:
        """The most frames that a vision graph takes, of so many tiles and ``tokens`` for one choice."""
        ...

    def cut_frames(self, images: Sequence[Image.Image], resample: int) -> Cut:
        """Each RGB frame as a tile; ``resample`` is Pillow's filter code."""
        ...


SEVERAL, VIDEO = "several", "video"  # fields of a tiling that hold another one: for several pictures, for a video
TILINGS = Registry(
    "tiling",
    {
        "anyres": "svdprune.runtime.tiling.anyres:read",
        "idefics3": "svdprune.runtime.tiling.idefics3:read",
        "internvl": "svdprune.runtime.tiling.internvl:read",
        "patches": "svdprune.runtime.tiling.patches:read",
        "square": "svdprune.runtime.tiling.square:read",
        "whole": "svdprune.runtime.tiling.whole:read",
    },
)
VIDEO_TILINGS = Registry("video tiling", {"pooled": "svdprune.runtime.tiling.frames:read"})


def tiling_of(settings: dict[str, Any], file: str = "image.json", pictures: int = 1) -> Tiling:
    """The tiling that ``settings`` (of ``ImageSettings.tiling``) describe.

    Args:
        pictures: how many the prompt holds; some models cut a picture otherwise when it is not alone.

    Raises:
        BundleError: a kind that is not known, or fields that do not fit it.
    """
    if pictures > 1 and settings.get(SEVERAL) is not None:
        settings = settings[SEVERAL]
    tiling: Tiling = _read(TILINGS, settings, file)
    return tiling


def video_tiling_of(settings: dict[str, Any], file: str = "image.json") -> VideoTiling | None:
    """How the model takes the frames of a video as one picture; None where it takes them as pictures of their own.

    Raises:
        BundleError: as of ``tiling_of``.
    """
    if settings.get(VIDEO) is None:
        return None
    tiling: VideoTiling = _read(VIDEO_TILINGS, settings[VIDEO], file)
    return tiling


def _read(kinds: Registry, settings: dict[str, Any], file: str) -> Any:
    kind = settings.get("kind")
    if kind not in kinds.names():
        raise BundleError(f"{file}: the tiling {kind!r} is not known to this svdprune: upgrade svdprune")
    return kinds.find(str(kind))({k: v for k, v in settings.items() if k not in ("kind", SEVERAL, VIDEO)}, file)
