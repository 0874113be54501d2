"""How few directions hold how much of a picture's features: the energy curve."""

from __future__ import annotations

import numpy as np

from svdprune.runtime.errors import NumericalError, UserError

LEVELS = (0.8, 0.9, 0.95, 0.99)  # shares of the variance that are reported
ROUNDING = 1e-12  # a share counts as reached this close to it


def energy_curve(features: np.ndarray, centre: bool = False) -> np.ndarray:
    """Share of sum_j s_j^2 in the first 1, 2, ... directions of features (T, D): float64 (min(T, D),), the last 1.

    Features that are all zero (or all equal, where centred) have no variance: every entry is 1.

    Raises:
        NumericalError: a feature is NaN or infinite.
    """
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise NumericalError("the features hold NaN or infinity, so they have no energy curve")
    if centre:
        x = x - x.mean(axis=0)
    # Squared singular values are eigenvalues of the smaller Gram matrix; the squares are all that is asked for.
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    sums = np.cumsum(squares)
    noise = np.finfo(np.float64).eps * len(x) * float((np.asarray(features, np.float64) ** 2).sum())
    if sums[-1] <= noise:  # what centring leaves of equal tokens
        return np.ones(len(squares))
    return np.asarray(sums / sums[-1])


class Spectrum:
    """The energy curves of some pictures; T may differ."""

    def __init__(self, centre: bool = False) -> None:
        self.centre = centre
        self._curves: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Add one picture's features (T, D)."""
        self._curves.append(energy_curve(features, self.centre))

    @property
    def pictures(self) -> int:
        """How many were added."""
        return len(self._curves)

    @property
    def curve(self) -> np.ndarray:
        """The mean curve, float64 (min(T, D),), of the largest T.

        Raises:
            UserError: no pictures.
        """
        if not self._curves:
            raise UserError("an energy curve needs the features of at least one picture: none were given")
        longest = max(map(len, self._curves))
        return np.asarray(
            np.mean([np.pad(curve, (0, longest - len(curve)), constant_values=1.0) for curve in self._curves], axis=0)
        )

    def rank(self, variance: float) -> int:
        """The fewest directions that hold `variance`, a share in (0, 1], on average over the pictures."""
        return _reached(self.curve, variance)

    def ranks(self, variance: float) -> list[int]:
        """The fewest directions for each picture: the paper's own rule."""
        return [_reached(curve, variance) for curve in self._curves]


def _reached(curve: np.ndarray, variance: float) -> int:
    if not 0.0 < variance <= 1.0:
        raise UserError(f"variance is a share above 0 and up to 1 (0.9 is 90 %), not {variance!r}")
    return min(len(curve), 1 + int(np.searchsorted(curve, variance - ROUNDING)))
