"""Leverage with a share of the budget spread over the picture.

Leverage keeps what carries much wherever it is, so all of it may lie in one place. Here the picture is divided into
cells, as many as half of the budget, and the best token of each is kept; the other half goes to the tokens of largest
leverage among the rest.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.baselines import bands_of
from svdprune.exporter.selection.leverage import leverage
from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.registry import Task, register

SHARE = 0.5  # of the budget that is spread (measured: docs/quality.md)
AHEAD = 1.01  # times the largest score is added to the best of each cell: above all others, and no further


@register("leverage-grid", by_leverage=True)
def leverage_over_cells(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Leverage (B, T), and for the best token of each cell, the lowest index of equal ones, more than any has."""
    scores = leverage(op, tokens, None, task)  # (B, T), sum 1
    cells = cells_of(task.needed_grid(), cell_count(task.needed_keep()))
    same = cells[:, None] == cells[None]
    order = np.arange(task.tokens)
    before = (same & (order[None] < order[:, None])).astype(np.float32)
    after = (same & (order[None] > order[:, None])).astype(np.float32)
    column = op.unsqueeze(scores, 2)
    reached = op.at_least(op.transpose(column), column)  # (B, T, T): row t, column s: whether s has as much as t
    # t is beaten by an s before it that has as much, and by an s after it that has more.
    beaten = op.sum(op.add(op.mul(reached, before), op.mul(op.sub(1.0, op.transpose(reached)), after)), 2)
    best = op.sub(1.0, op.at_least(beaten, 0.5))  # (B, T, 1)
    ahead = op.mul(op.max(scores, 1), AHEAD)  # (B, 1)
    return op.add(scores, op.mul(op.squeeze(best, 2), ahead))


def cell_count(keep: int) -> int:
    """How many cells a budget of K is spread over."""
    return max(1, round(SHARE * keep))


def cells_of(grid: tuple[int, int], count: int) -> np.ndarray:
    """The cell, 0 to `count` - 1, of each of rows x columns places, int64 (T,): bands of rows, evenly divided."""
    rows, columns = grid
    bands = bands_of(grid, count)
    cells = np.zeros(grid, np.int64)
    number = 0
    for band in range(bands):
        inside = (band + 1) * count // bands - band * count // bands
        lines = slice(band * rows // bands, (band + 1) * rows // bands)
        for place in range(inside):
            cells[lines, place * columns // inside : (place + 1) * columns // inside] = number
            number += 1
    return cells.ravel()
