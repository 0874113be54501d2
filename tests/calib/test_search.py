"""The searches, against looking at every point."""

from __future__ import annotations

import numpy as np
import pytest

from svdprune.calib.search import CONFIRM, cheapest, keep_grid, smallest_passing


def test_the_first_that_passes_is_the_last_tried() -> None:
    tried, met = cheapest(range(10), lambda n: n * n, lambda square: square >= 10)
    assert met and tried == [(0, 0), (1, 1), (2, 4), (3, 9), (4, 16)]
    tried, met = cheapest(range(3), lambda n: n, lambda value: value > 5)
    assert not met and len(tried) == 3


def test_the_grid_of_counts() -> None:
    assert keep_grid(576) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert keep_grid(9) == [1, 2, 3, 4, 6, 8]
    assert keep_grid(2) == [1] and keep_grid(1) == []


@pytest.mark.parametrize("answer", range(7))
def test_a_rising_curve_needs_few_points(answer: int) -> None:
    grid = [2, 4, 8, 16, 32, 64]
    asked: list[int] = []

    def measure(point: int) -> float:
        asked.append(point)
        return float(grid.index(point) >= answer)

    found = smallest_passing(grid, measure, 1.0)
    assert found.answer == (grid[answer] if answer < len(grid) else None)
    assert found.irregular == [] and len(asked) == len(set(asked)) <= 3 + CONFIRM
    assert list(found.values) == sorted(asked)


@pytest.mark.parametrize("seed", range(200))
def test_on_any_curve_all_that_was_measured_above_the_answer_passes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = sorted(rng.choice(np.arange(1, 100), rng.integers(1, 14), replace=False).tolist())
    curve = dict(zip(grid, rng.random(len(grid)), strict=True))
    asked: list[int] = []

    def measure(point: int) -> float:
        asked.append(point)
        return float(curve[point])

    found = smallest_passing(grid, measure, 0.5)
    assert len(asked) == len(set(asked))  # each point once
    if found.answer is None:
        assert curve[grid[-1]] < 0.5
        return
    place = grid.index(found.answer)
    assert curve[found.answer] >= 0.5
    assert place == 0 or curve[grid[place - 1]] < 0.5  # the next smaller one fails, and was measured
    assert place == 0 or grid[place - 1] in found.values
    above = [point for point in found.values if point > found.answer]
    assert all(curve[point] >= 0.5 for point in above)
    assert set(grid[place + 1 : place + 1 + CONFIRM]) <= set(above)
    assert all(curve[point] >= 0.5 and point < found.answer for point in found.irregular)
    assert set(found.irregular) == {p for p in found.values if p < found.answer and curve[p] >= 0.5}


def test_a_dip_above_the_answer_sends_the_search_on() -> None:
    curve = {1: 0.2, 2: 0.99, 4: 0.9, 8: 0.99, 16: 1.0, 32: 1.0}
    found = smallest_passing(list(curve), curve.__getitem__, 0.98)
    assert found.answer == 8
    lucky = {1: 0.2, 2: 0.2, 4: 0.99, 8: 0.9, 16: 0.99, 32: 1.0}
    found = smallest_passing(list(lucky), lucky.__getitem__, 0.98)
    assert found.answer == 16 and found.irregular == [4]


def test_a_grid_that_does_not_ascend_is_a_bug() -> None:
    with pytest.raises(ValueError, match="ascend"):
        smallest_passing([4, 2], lambda point: 1.0, 0.5)
    assert smallest_passing([], lambda point: 1.0, 0.5).answer is None
