"""The rows that a pruned picture has in the prompt: kept tokens, and the marks between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from svdprune.runtime.tiling import Cut


def sequence(
    cut: Cut,
    kept: np.ndarray,
    features: np.ndarray,
    embed: Callable[[Sequence[int]], np.ndarray],
    extra: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their places in the unpruned sequence.

    Args:
        kept: int64 [k], the kept candidates, ascending; features: float32 [k, H].
        embed: looks up tokens, for marks that are tokens. extra: float32 [E, H], for those that are not.

    Returns:
        float32 [r, H], and int64 [r], ascending, below ``cut.total``.
    """
    places = cut.places[kept]
    marks = kept_marks(cut.marks, places)
    if not len(marks):
        return features, places
    rows = np.empty((len(marks), features.shape[1]), np.float32)
    tokens = marks[:, 1] >= 0
    if tokens.any():
        rows[tokens] = embed(marks[tokens, 1].tolist())
    if not tokens.all():
        assert extra is not None  # a bundle whose tiling has such marks holds their rows
        rows[~tokens] = extra[-1 - marks[~tokens, 1]]
    every = np.concatenate([places, marks[:, 0]])
    order = np.argsort(every, kind="stable")
    return np.concatenate([features, rows])[order], every[order]


def kept_marks(marks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Those of the marks [M, 3] that stay when only the tokens at ``places`` (ascending) do."""
    row, since = marks[:, 0], marks[:, 2]
    held = np.searchsorted(places, np.maximum(row, since), "right") > np.searchsorted(places, np.minimum(row, since))
    return marks[(since < 0) | held]
