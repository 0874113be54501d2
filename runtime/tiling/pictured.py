"""The rows of a picture that was cut, with all that goes with them into the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from svdprune.runtime.answer import Sight, Tiled
from svdprune.runtime.arrays import host_rows
from svdprune.runtime.positions import Span
from svdprune.runtime.prompt import Pictured
from svdprune.runtime.tiling import Cut
from svdprune.runtime.tiling.sequence import sequence
from svdprune.runtime.tiling.slots import Chosen


def pictured(
    cut: Cut, found: Chosen, embed: Callable[[Sequence[int]], np.ndarray], marks: np.ndarray | None = None
) -> Pictured:
    """Kept tokens and the marks between them, as one picture of a prompt.

    Args:
        embed: looks up tokens, for marks that are tokens. marks: float32 [E, H], for those that are not.

    A mark has no DeepStack levels, which are zeros there. A cut with positions of three axes has no marks.
    """
    rows, places = sequence(cut, found.kept, found.features, embed, marks)
    levels = found.deepstack
    if levels is not None and len(places) != len(found.kept):
        spread = np.zeros((len(levels), *rows.shape), np.float32)
        spread[:, np.searchsorted(places, cut.places[found.kept])] = levels
        levels = spread
    if cut.positions is None:
        return Pictured(Span(places, cut.total), rows, levels)
    if len(places) != len(found.kept):
        raise ValueError("a tiling with positions of three axes cannot have marks")
    return Pictured(Span(places, cut.total, cut.positions[found.kept], cut.advance), rows, levels)


def sight_of(
    cut: Cut,
    found: Chosen,
    embed: Callable[[Sequence[int]], np.ndarray],
    marks: np.ndarray | None = None,
) -> Sight:
    """``pictured`` with what was kept and how it scored."""
    made = pictured(cut, found, embed, marks)
    span = made.span
    tiled = Tiled(span.kept, span.total, cut.views, span.positions, span.advance)
    features = host_rows([made.features])
    return Sight(features, found.kept, found.scores, cut.pixels[0], tiled=tiled, deepstack=made.deepstack)
