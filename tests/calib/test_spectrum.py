"""Energy curves against singular values computed outright."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.calib.spectrum import Spectrum, energy_curve
from svdprune.runtime.errors import NumericalError, UserError


def features(seed: int = 0, tokens: int = 20, channels: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, channels)) * np.arange(1, channels + 1) ** -1.0 + 2.0).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 12), (7, 12)])
@pytest.mark.parametrize("centre", [False, True])
def test_the_curve_is_that_of_the_singular_values(shape: tuple[int, int], centre: bool) -> None:
    x = features(1, *shape).astype(np.float64)
    squares = np.linalg.svd(x - x.mean(axis=0) if centre else x, compute_uv=False) ** 2
    curve = energy_curve(features(1, *shape), centre)
    np.testing.assert_allclose(curve, np.cumsum(squares) / squares.sum(), atol=1e-12)
    assert curve[-1] == 1.0 and (np.diff(curve) >= 0).all()


def test_one_direction_holds_a_shared_mean_until_it_is_subtracted() -> None:
    x = features() + 50.0
    assert energy_curve(x)[0] > 0.99 > 0.9 > energy_curve(x, centre=True)[0]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_tokens_have_no_variance_left_when_centred(value: float) -> None:
    np.testing.assert_array_equal(energy_curve(np.full((6, 4), value), centre=True), np.ones(4))


def test_ranks_of_the_mean_curve_and_of_each_picture() -> None:
    spectrum = Spectrum()
    diagonals = ([3.0, 1.0, 0.0], [1.0, 1.0, 1.0])  # shares 0.9 1 1 and 1/3 2/3 1
    for diagonal in diagonals:
        spectrum.add(np.diag(diagonal))
    np.testing.assert_allclose(spectrum.curve, [(0.9 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1.0])
    assert spectrum.ranks(0.9) == [1, 3]  # 0.9 exactly counts as reached
    assert [spectrum.rank(share) for share in (0.6, 0.7, 0.9, 1.0)] == [1, 2, 3, 3]
    assert spectrum.pictures == 2


def test_what_has_no_curve_is_refused() -> None:
    with pytest.raises(UserError, match="at least one picture"):
        _ = Spectrum().curve
    spoiled = features()
    spoiled[3, 4] = np.inf
    with pytest.raises(NumericalError, match="hold NaN or infinity"):
        energy_curve(spoiled)
    spectrum = Spectrum()
    spectrum.add(features())
    for variance in (0.0, 1.5, -0.1):
        with pytest.raises(UserError, match="above 0 and up to 1"):
            spectrum.rank(variance)
