"""The calibrated start: leading right singular vectors of pooled features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from svdprune.calib.start import calibrated_start
from svdprune.runtime.errors import NumericalError, UserError


def pictures(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    falling = np.arange(1, 13) ** -1.0
    return [(rng.standard_normal((tokens, 12)) * falling + 2.0).astype(np.float32) for tokens in (20, 30, 25)]


@pytest.mark.parametrize("centre", [False, True])
def test_the_start_is_the_svd_of_the_pooled_features(centre: bool) -> None:
    pooled = np.concatenate([x - x.mean(axis=0) if centre else x for x in map(np.float64, pictures())])
    expected = np.linalg.svd(pooled, full_matrices=False)[2][:5].T
    start = calibrated_start(iter(pictures()), 5, centre)
    assert start.shape == (12, 5) and start.dtype == np.float64
    np.testing.assert_allclose(np.abs(start.T @ expected), np.eye(5), atol=1e-8)


def test_signs_are_settled_and_columns_orthonormal() -> None:
    start = calibrated_start(pictures(), 12)
    np.testing.assert_allclose(start.T @ start, np.eye(12), atol=1e-12)
    assert (start[np.abs(start).argmax(axis=0), np.arange(12)] > 0).all()


def test_pictures_are_taken_one_at_a_time_and_batches_pooled() -> None:
    batch = np.stack([x[:20] for x in pictures()])

    def stream() -> Iterator[np.ndarray]:
        yield from batch

    np.testing.assert_allclose(calibrated_start(stream(), 4), calibrated_start([batch], 4), atol=1e-12)


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(UserError, match="at least one picture"):
        calibrated_start([], 4)
    with pytest.raises(UserError, match="8 and of 12 channels do not pool"):
        calibrated_start([np.ones((3, 12)), np.ones((3, 8))], 4)
    with pytest.raises(UserError, match="a start of 13 columns is not possible for 12 channels"):
        calibrated_start(pictures(), 13)
    spoiled = pictures()
    spoiled[1][3, 4] = np.nan
    with pytest.raises(NumericalError, match="calibration features hold NaN"):
        calibrated_start(spoiled, 4)
