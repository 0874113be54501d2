"""What each selector ought to give, in float64 NumPy with an exact SVD: the judge of the torch and ONNX forms.

Written apart from them: nothing of their arithmetic is used here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from svdprune.exporter.selection.baselines import LEVELS, grid_indices
from svdprune.exporter.selection.config import SelectorConfig
from svdprune.exporter.selection.coverage import AHEAD, cell_count, cells_of
from svdprune.exporter.selection.leverage import TIE
from svdprune.runtime.errors import NumericalError


def leverage_scores(
    features: np.ndarray, rank: int = 16, variance: float | None = None, centre: bool = False, limit: int | None = None
) -> np.ndarray:
    """l_t = (1/r) sum_{j<=r} U[t,j]^2 for features (T, D), float64 (T,), summing to 1; NaN if a feature is not finite.

    r is `rank`, or with `variance` the smallest that reaches that share of sum s_j^2 (at most `limit`). Directions
    below float32's rank tolerance, s_1 max(T, D) eps, do not count; features that are all zero score 1/T each.
    """
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        return np.full(x.shape[0], np.nan)
    if centre:
        x = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    if s[0] == 0.0:
        return np.full(x.shape[0], 1.0 / x.shape[0])
    r = rank if variance is None else variance_rank(s, variance, limit)
    r = min(r, int((s > s[0] * max(x.shape) * np.finfo(np.float32).eps).sum()))
    return (u[:, :r] ** 2).sum(axis=1) / r


def variance_rank(singular_values: np.ndarray, variance: float, limit: int | None = None) -> int:
    """The smallest r with sum_{j<=r} s_j^2 >= variance sum_j s_j^2, at most `limit`."""
    energy = np.cumsum(np.asarray(singular_values, np.float64) ** 2)
    r = 1 + int(np.searchsorted(energy, variance * energy[-1]))
    return min(r, len(energy), limit or len(energy))


def merged_ties(scores: np.ndarray) -> np.ndarray:
    """Scores with those closer than TIE (relatively) made equal, as the other two forms give them."""
    share = np.abs(scores) / np.abs(scores).max()
    rounded = np.exp(np.round(np.log(share + 1e-30) / TIE) * TIE)
    return np.asarray(rounded / rounded.sum())


def reference_scores(
    config: SelectorConfig,
    features: np.ndarray,
    cls_attention: np.ndarray | None = None,
    *,
    grid: tuple[int, int] | None = None,
    keep: int | None = None,
) -> np.ndarray:
    """Scores (T,) of one picture's features (T, D), float64. NaN throughout when a feature is not finite."""
    features = np.asarray(features, np.float64)
    tokens, channels = features.shape
    if not np.isfinite(features).all():
        return np.full(tokens, np.nan)

    def leverage() -> np.ndarray:
        limit = config.rank_limit(config.columns(tokens, channels))
        return merged_ties(leverage_scores(features, config.rank, config.variance, config.centre, limit))

    def cls() -> np.ndarray:
        assert cls_attention is not None
        return np.asarray(cls_attention, np.float64)

    def norm() -> np.ndarray:
        return np.asarray(np.linalg.norm(features, axis=1))

    def random() -> np.ndarray:
        return np.asarray((np.random.default_rng(config.seed).permutation(tokens) + 1) / tokens)

    def uniform() -> np.ndarray:
        assert grid is not None and keep is not None
        scores = np.zeros(tokens)
        scores[grid_indices(grid, keep)] = 1.0
        return scores

    def maxmin() -> np.ndarray:
        assert keep is not None
        return _max_min(features, keep)

    def dpp() -> np.ndarray:
        assert keep is not None
        return _determinantal(_unit(features), keep)

    def leverage_dpp() -> np.ndarray:
        assert keep is not None
        scores = leverage()
        return _determinantal(_unit(features) * np.sqrt(scores / scores.max())[:, None], keep)

    def leverage_grid() -> np.ndarray:
        assert keep is not None and grid is not None
        scores, cells = leverage(), cells_of(grid, cell_count(keep))
        best = [np.flatnonzero(cells == cell)[scores[cells == cell].argmax()] for cell in range(cells.max() + 1)]
        scores[best] += AHEAD * scores.max()
        return scores

    def none() -> np.ndarray:
        return np.full(tokens, 1.0 / tokens)

    forms: dict[str, Callable[[], np.ndarray]] = {
        "leverage": leverage,
        "cls": cls,
        "norm": norm,
        "random": random,
        "grid": uniform,
        "maxmin": maxmin,
        "dpp": dpp,
        "leverage-dpp": leverage_dpp,
        "leverage-grid": leverage_grid,
        "none": none,
    }
    return forms[config.name]()


def _max_min(features: np.ndarray, keep: int) -> np.ndarray:
    directions = _unit(features)
    distances = np.round((1.0 - directions @ directions.T) * LEVELS)
    np.fill_diagonal(distances, np.inf)
    scores = np.zeros(len(features))
    chosen = [int(distances.min(axis=1).argmax())]
    while len(chosen) < keep:
        nearest = distances[chosen].min(axis=0)
        nearest[chosen] = -np.inf
        chosen.append(int(nearest.argmax()))
    scores[chosen] = np.arange(keep, 0, -1)
    return scores


def _unit(features: np.ndarray) -> np.ndarray:
    return np.asarray(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-300))


def _determinantal(directions: np.ndarray, keep: int) -> np.ndarray:
    """Greedy largest determinant of their kernel, by taking each choice's direction out of what is left."""
    left = directions
    chosen: list[int] = []
    while len(chosen) < keep:
        squares = (left**2).sum(axis=1)
        steps = np.round(squares * LEVELS)
        steps[chosen] = -np.inf
        pick = int(steps.argmax())
        chosen.append(pick)
        if squares[pick] * LEVELS >= 1.0:
            unit = left[pick] / squares[pick] ** 0.5
            left = left - np.outer(left @ unit, unit)
    scores = np.zeros(len(directions))
    scores[chosen] = np.arange(keep, 0, -1)
    return scores


def keep_indices(scores: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` largest of scores (T,) or (B, T), ascending int64; of equal ones the lowest index, as ONNX's TopK.

    Raises:
        NumericalError: a score is NaN or infinite, so any choice would be arbitrary.
    """
    scores = np.asarray(scores)
    if not 1 <= keep <= scores.shape[-1]:
        raise ValueError(f"cannot keep {keep} of {scores.shape[-1]} tokens")
    if not np.isfinite(scores).all():
        raise NumericalError(
            "the scores hold NaN or infinity, so no choice of tokens can be made: "
            "the features they come from are not finite"
        )
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :keep]
    return np.sort(best, axis=-1).astype(np.int64)
