"""Intervals and divergences against what they are defined to be."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.calib.statistics import bootstrap_mean, f1, kl_divergence, share_interval, wilson


def test_wilson_is_the_known_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(500, 1000)
    assert low < 0.5 < high and high - low == pytest.approx(2 * 0.031, abs=1e-3)


def test_the_bootstrap_covers_as_a_normal_interval_would_and_draws_whole_pictures() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, 400)
    low, high = bootstrap_mean(values, range(400))
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)
    repeated = np.repeat(values[:40], 10)  # ten questions that say the same are no more than one
    one, ten = bootstrap_mean(values[:40], range(40)), bootstrap_mean(repeated, np.repeat(range(40), 10))
    assert ten == pytest.approx(one, abs=1e-9)
    assert bootstrap_mean(values, range(400)) == (low, high)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([], [])


def test_partial_credit_takes_the_bootstrap() -> None:
    assert share_interval([1.0, 0.0, 1.0, 1.0], [0, 1, 2, 3]) == wilson(3, 4)
    assert share_interval([1.0, 0.3, 0.6, 1.0], [0, 1, 2, 3]) == wilson(2.9, 4)  # too few to draw from
    low, high = share_interval([1.0, 0.3, 0.6, 1.0] * 5, range(20))
    assert 0.5 < low < 0.725 < high < 0.95 and (low, high) != wilson(2.9 * 5, 20)


def test_a_few_groups_give_their_range() -> None:
    assert bootstrap_mean([0.0, 1.0, 4.0, 2.0], [0, 0, 1, 2]) == (0.5, 4.0)


def test_f1() -> None:
    # hits 2, missed 1, false alarms 1
    assert f1([1, 1, 0, 1, 0], [True, True, True, False, False]) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1([1.0], [False]) == 0.0


def test_kl_is_zero_for_equals_and_the_sum_otherwise() -> None:
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    assert kl_divergence(p, p) == 0.0
    assert kl_divergence(p, q) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert kl_divergence(np.stack([p, q]), np.stack([q, q])).shape == (2,)
