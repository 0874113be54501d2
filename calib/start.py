"""The calibrated start of the leverage selector: the directions that a model's features usually have."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from svdprune.runtime.errors import NumericalError, UserError


class Pool:
    """The pooled features of some pictures: sums of F^T F over them, raw and centred, D x D in float64.

    Pictures are added one at a time and may have different numbers of tokens.
    """

    def __init__(self) -> None:
        self.pictures = 0
        self._raw: np.ndarray | None = None
        self._means: np.ndarray | None = None  # sum of T m m^T, m a picture's mean token

    def add(self, features: np.ndarray) -> None:
        """Add one picture's features (T, D).

        Raises:
            UserError: another D than before.
            NumericalError: a feature is NaN or infinite.
        """
        picture = np.asarray(features, np.float64)
        tokens, channels = picture.shape
        if self._raw is None or self._means is None:
            self._raw, self._means = np.zeros((2, channels, channels))
        if channels != len(self._raw):
            raise UserError(f"calibration features of {channels} and of {len(self._raw)} channels do not pool")
        if not np.isfinite(picture).all():
            raise NumericalError("the calibration features hold NaN or infinity: leave out the picture they come from")
        mean = picture.mean(axis=0)
        self._raw += picture.T @ picture
        self._means += tokens * np.outer(mean, mean)
        self.pictures += 1

    def start(self, block: int, centre: bool = False) -> np.ndarray:
        """Leading right singular vectors of the pooled features, as `calibrated_start`."""
        if self._raw is None or self._means is None:
            raise UserError("a calibrated start needs the features of at least one picture: none were given")
        channels = len(self._raw)
        if not 1 <= block <= channels:
            raise UserError(f"a start of {block} columns is not possible for {channels} channels: give 1 to {channels}")
        moment = self._raw - self._means if centre else self._raw
        start = np.linalg.eigh(moment)[1][:, ::-1][:, :block]
        largest = np.take_along_axis(start, np.abs(start).argmax(axis=0)[None], axis=0)
        return np.ascontiguousarray(start * np.sign(largest))


def calibrated_start(features: Iterable[np.ndarray], block: int, centre: bool = False) -> np.ndarray:
    """Leading right singular vectors of the pooled features of some pictures.

    Args:
        features: for each picture, (T, D), or a batch (B, T, D); T may differ. Read once, one at a time: only D x D
            sums are held, in float64.
        block: b, the columns wanted, at most D. A selector may use fewer.
        centre: subtract each picture's mean token first, as the selector that will use the start does.

    Returns:
        W (D, b) float64, orthonormal columns, the largest singular value first, each column's largest entry
        positive.

    Raises:
        UserError: no features, features of different widths, or a block outside 1 to D.
        NumericalError: a feature is NaN or infinite.
    """
    pool = Pool()
    for batch in features:
        for picture in np.asarray(batch).reshape(-1, *np.shape(batch)[-2:]):
            pool.add(picture)
    return pool.start(block, centre)
