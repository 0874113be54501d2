"""Intervals for what was measured on a sample of pictures and questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z = 1.959964  # 95 % of a normal distribution lies within this many deviations
FEWEST = 10  # groups to draw from; with fewer, drawing them again and again shows much less than their spread
DRAWS = 2000  # bootstrap samples; the ends of a 95 % interval then vary by a few per cent of its width


def wilson(right: float, of: int) -> tuple[float, float]:
    """95 % interval of a share, `right` of `of` (E. B. Wilson, JASA 22, 1927); the whole range for an empty sample."""
    if of == 0:
        return 0.0, 1.0
    p, z = right / of, Z
    middle, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / of)), min(1.0, (middle + half) / (1 + z * z / of))


def bootstrap_mean(values: Sequence[float], groups: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, whole groups drawn with replacement (B. Efron, 1979).

    Args:
        values: one a question. groups: the picture that each belongs to: questions about one picture stand or fall
            together, so it is pictures that are drawn.

    With fewer than `FEWEST` groups it is the range of the groups' means.
    """
    sums, counts = _totals(values, groups)
    if len(sums) == 0:
        raise ValueError("no values to draw from")
    if len(sums) < FEWEST:
        return float((sums / counts).min()), float((sums / counts).max())
    drawn = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def share_interval(scores: Sequence[float], groups: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Wilson where every score is 0 or 1, otherwise (partial credit, means over seeds) the bootstrap."""
    if len(set(groups)) < FEWEST or all(score in (0.0, 1.0) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap_mean(scores, groups, seed)


def f1(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """F1 of the positive answer of two-way questions: whether each was right, whether its label is positive."""
    hit = sum(score for score, yes in zip(scores, positive, strict=True) if yes)
    missed = sum(positive) - hit
    false = sum(1.0 - score for score, yes in zip(scores, positive, strict=True) if not yes)
    return 2 * hit / (2 * hit + missed + false) if hit + missed + false else 0.0


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """sum_v p (log p - log q) over the last axis, nats; 0 for equal distributions, never below."""
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def _totals(values: Sequence[float], groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the values of each group."""
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    size = int(places.max()) + 1 if len(places) else 0
    return (
        np.bincount(places, weights=np.asarray(values, np.float64), minlength=size),
        np.bincount(places, minlength=size).astype(np.float64),
    )
