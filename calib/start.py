"""The calibrated start of the leverage selector: the directions that a model's features usually have."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from svdprune.runtime.errors import NumericalError, UserError


def calibrated_start(features: Iterable[np.ndarray], block: int, centre: bool = False) -> np.ndarray:
    """Leading right singular vectors of the pooled features of some pictures.

    Args:
        features: for each picture, (T, D), or a batch (B, T, D); T may differ. Read once, one at a time: only the
            D x D sum of F^T F is held, in float64.
        block: b, the columns wanted, at most D. A selector may use fewer.
        centre: subtract each picture's mean token first, as the selector that will use the start does.

    Returns:
        W (D, b) float64, orthonormal columns, the largest singular value first, each column's largest entry
        positive.

    Raises:
        UserError: no features, features of different widths, or a block outside 1 to D.
        NumericalError: a feature is NaN or infinite.
    """
    moment: np.ndarray | None = None
    for batch in features:
        for picture in np.asarray(batch, np.float64).reshape(-1, *np.shape(batch)[-2:]):
            if moment is None:
                moment = np.zeros((picture.shape[1], picture.shape[1]))
            if picture.shape[1] != len(moment):
                raise UserError(f"calibration features of {picture.shape[1]} and of {len(moment)} channels do not pool")
            if not np.isfinite(picture).all():
                raise NumericalError(
                    "the calibration features hold NaN or infinity: leave out the picture they come from"
                )
            if centre:
                picture = picture - picture.mean(axis=0)
            moment += picture.T @ picture
    if moment is None:
        raise UserError("a calibrated start needs the features of at least one picture: none were given")
    if not 1 <= block <= len(moment):
        raise UserError(
            f"a start of {block} columns is not possible for {len(moment)} channels: give 1 to {len(moment)}"
        )
    start = np.linalg.eigh(moment)[1][:, ::-1][:, :block]
    largest = np.take_along_axis(start, np.abs(start).argmax(axis=0)[None], axis=0)
    return np.ascontiguousarray(start * np.sign(largest))
