"""The selectors that `leverage` is compared with, and `none`. All give scores (B, T) float32, larger is kept."""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.registry import Task, register

TINY = 1e-30
LEVELS = 2.0**14  # cosine distances are compared in steps of 1 / LEVELS, so identical tokens are at distance 0


@register("cls", needs_cls_attention=True, any_keep=True, padding=True)
def cls_attention_scores(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """What the [CLS] token attends to, mean over heads, as given."""
    assert cls_attention is not None  # `build_selector` and `selector_model` see to it
    return op.add(cls_attention, nothing(op, tokens))


@register("norm", any_keep=True, padding=True)
def feature_norm(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Euclidean norm of each token's feature."""
    largest = op.add(op.max(op.abs(tokens), 1, 2), TINY)  # (B, 1, 1): squares neither overflow nor vanish
    return op.squeeze(op.mul(op.norm(op.div(tokens, largest), 2), largest), 2)


@register("random", any_keep=True, padding=True)
def random_order(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """One seeded order of the tokens, the same for every picture."""
    order = np.random.default_rng(task.config.seed).permutation(task.tokens)
    return op.add(nothing(op, tokens), ((order + 1) / task.tokens).astype(np.float32)[None])


@register("grid")
def uniform_grid(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """1 for K tokens spread evenly over the picture, 0 for the others."""
    chosen = np.zeros((1, task.tokens), np.float32)
    chosen[0, grid_indices(task.needed_grid(), task.needed_keep())] = 1.0
    return op.add(nothing(op, tokens), chosen)


@register("maxmin", padding=True)
def max_min_distance(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """DivPrune's choice (arXiv 2503.02175): greedily the token farthest, by cosine, from those chosen before.

    The first is the one whose nearest neighbour is farthest. Scores: K for the first, K - 1 for the next, ..., 1; 0
    for the others.
    """
    keep = task.needed_keep()
    directions = unit_directions(op, tokens)
    cosines = op.matmul(directions, op.transpose(directions))  # (B, T, T)
    distances = op.round(op.mul(op.sub(1.0, cosines), LEVELS))
    identity = np.eye(task.tokens, dtype=np.float32)
    # A chosen token must never be the farthest again: its distance to itself is below every other.
    apart = op.add(distances, 4.0 * LEVELS * identity)
    distances = op.sub(distances, 4.0 * LEVELS * identity)
    if task.padded:  # rows of zeros are nobody's neighbour, and farther than any token only from those chosen
        absent = absent_rows(op, directions)  # (B, T, 1)
        apart = op.sub(op.add(apart, op.transpose(op.mul(absent, 4.0 * LEVELS))), op.mul(absent, 8.0 * LEVELS))
        distances = op.sub(distances, op.transpose(op.mul(absent, 3.0 * LEVELS)))
    nearest = op.squeeze(op.min(apart, 2), 2)  # (B, T)
    picks = []
    for number in range(keep):
        pick = op.best(nearest)  # (B, 1)
        picks.append(pick)
        if number == 0:
            nearest = op.row(distances, pick)
        elif number < keep - 1:
            nearest = op.minimum(nearest, op.row(distances, pick))
    return op.add(points_of(op, picks, task.tokens), nothing(op, tokens))


@register("none", any_keep=True, padding=True)
def everything(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Equal scores: every token is kept."""
    return op.add(nothing(op, tokens), np.full((1, task.tokens), 1.0 / task.tokens, np.float32))


def grid_indices(grid: tuple[int, int], keep: int) -> np.ndarray:
    """K of rows x columns places, ascending int64 (K,): bands of rows, evenly filled, places in mid-cell."""
    rows, columns = grid
    bands = bands_of(grid, keep)
    chosen = []
    for band in range(bands):
        row = (2 * band + 1) * rows // (2 * bands)
        inside = (band + 1) * keep // bands - band * keep // bands
        chosen += [row * columns + (2 * i + 1) * columns // (2 * inside) for i in range(inside)]
    return np.array(chosen, np.int64)


def bands_of(grid: tuple[int, int], count: int) -> int:
    """Into how many bands of rows a grid is divided so that `count` parts of them are about square."""
    rows, columns = grid
    return min(rows, count, max(-(-count // columns), round((count * rows / columns) ** 0.5)))


def absent_rows(op: Ops[V], directions: V) -> V:
    """(B, T, 1): 1 for a row of zeros, which stands for no token, 0 for the others."""
    return op.sub(1.0, op.at_least(op.max(op.abs(directions), 2), TINY))


def unit_directions(op: Ops[V], tokens: V) -> V:
    """Each token (B, T, D) at length 1, whatever the scale; a zero token stays zero."""
    scaled = op.div(tokens, op.add(op.max(op.abs(tokens), 1, 2), TINY))
    return op.div(scaled, op.add(op.norm(scaled, 2), TINY))


def points_of(op: Ops[V], picks: list[V], tokens: int) -> V:
    """Scores (B, T) of K tokens chosen one after the other: K for the first, ..., 1 for the last, 0 for the others."""
    points = np.arange(len(picks), 0, -1, dtype=np.float32)[None, :, None]
    return op.squeeze(op.sum(op.mul(op.hits(picks, tokens), points), 1), 1)


def nothing(op: Ops[V], tokens: V) -> V:
    """(B, 1) zeros that carry the batch size, and NaN for a picture whose features hold NaN or infinity."""
    return op.squeeze(op.sum(op.mul(tokens, 0.0), 1, 2), 2)
