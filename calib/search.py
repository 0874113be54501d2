"""Searches over settings whose every trial costs minutes: the cheapest that passes, and the smallest that passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

C = TypeVar("C")
R = TypeVar("R")

CONFIRM = 2  # points above the answer of a bisection that must pass as well


def cheapest(
    candidates: Iterable[C], measure: Callable[[C], R], passes: Callable[[R], bool]
) -> tuple[list[tuple[C, R]], bool]:
    """Try candidates, cheapest first, until one passes.

    Returns:
        What was tried, in order, and whether its last one passed.
    """
    tried: list[tuple[C, R]] = []
    for candidate in candidates:
        tried.append((candidate, measure(candidate)))
        if passes(tried[-1][1]):
            return tried, True
    return tried, False


@dataclass(frozen=True)
class Smallest:
    """What `smallest_passing` found.

    Attributes:
        answer: the smallest point from which on everything that was measured passes; None where the largest fails.
        values: what was measured, by point, ascending.
        irregular: points that pass although a larger one fails: the curve is not monotonic there.
    """

    answer: int | None
    values: dict[int, float]
    irregular: list[int]


def keep_grid(tokens: int) -> list[int]:
    """Counts of kept tokens worth trying, below `tokens`: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., each a third to a half
    more than the one before."""
    grid = {1} | {base * 2**power for base in (2, 3) for power in range(max(1, tokens).bit_length())}
    return sorted(count for count in grid if count < tokens)


def smallest_passing(grid: Sequence[int], measure: Callable[[int], float], wished: float) -> Smallest:
    """The smallest point of an ascending grid whose value, and that of the larger ones, is `wished` or more.

    A bisection, which would be all on a rising curve. A measured curve may go down again, so the next `CONFIRM` points
    above an answer are measured too; where one fails, the search goes on above it. A smaller point that passes beneath
    a failing one is not the answer, and is told. Each point is measured once.
    """
    if list(grid) != sorted(set(grid)):
        raise ValueError("the grid must ascend")
    values: dict[int, float] = {}
    while True:
        failing = [place for place, point in enumerate(grid) if values.get(point, wished) < wished]
        low = max(failing, default=-1)
        passing = [place for place in range(low + 1, len(grid)) if grid[place] in values]
        high = min(passing, default=len(grid))
        if high - low > 1:
            place = (low + high) // 2
        else:
            near = range(high + 1, min(high + 1 + CONFIRM, len(grid)))
            above = [place for place in near if grid[place] not in values]
            if not above:
                break
            place = above[0]
        values[grid[place]] = measure(grid[place])
    return Smallest(
        grid[high] if high < len(grid) else None,
        dict(sorted(values.items())),
        [grid[place] for place in range(low) if values.get(grid[place], -1.0) >= wished],
    )
