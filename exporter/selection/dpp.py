"""The choice of a determinantal point process: tokens whose directions span the largest volume.

CDPruner (arXiv 2506.10967) maximises det(L_S) greedily, L_ij = r_i cos(f_i, f_j) r_j, where r is the relevance of a
token to the question, from CLIP's text encoder. A vision graph knows no question, so here r = 1: the visual part of its
kernel. The greedy step is the published one (Chen, Zhang and Zhou, arXiv 1709.05135), an incremental factorisation of
the kernel: the next token is the one with the largest squared distance to the span of those chosen.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.baselines import LEVELS, absent_rows, nothing, points_of, unit_directions
from svdprune.exporter.selection.leverage import TINY, leverage
from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.registry import Task, register


@register("dpp", padding=True)
def determinantal(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """K for the first token chosen, K - 1 for the next, ..., 1; 0 for the others.

    Squared distances are compared in steps of 1 / LEVELS, so identical tokens are at distance 0 and the lowest index is
    taken of equal ones; all are equal at first, so token 0 is always kept.
    """
    directions = unit_directions(op, tokens)
    return _greedy(op, directions, directions, tokens, task)


@register("leverage-dpp", padding=True, by_leverage=True)
def determinantal_leverage(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """The same with r_i^2 = l_i / max l, the leverage score: what carries much, less what those chosen already say.

    Leverage alone ignores that two tokens may say the same: it keeps every patch of one salient object before the first
    of a fainter one. Scores as of `dpp`; the first token chosen is the one of largest leverage.
    """
    scores = leverage(op, tokens, None, task)  # (B, T)
    share = op.div(scores, op.add(op.max(scores, 1), TINY))
    relevance = op.exp(op.mul(op.log(op.add(share, TINY)), 0.5))  # the square root
    directions = unit_directions(op, tokens)
    return _greedy(op, op.mul(directions, op.unsqueeze(relevance, 2)), directions, tokens, task)


def _greedy(op: Ops[V], directions: V, plain: V, tokens: V, task: Task) -> V:
    """Greedy choice from the kernel of `directions` (B, T, D): (B, T) scores, K for the first chosen down to 1.

    `plain` are the directions of length 1, or 0 where a row stands for no token.
    """
    keep = task.needed_keep()
    kernel = op.matmul(directions, op.transpose(directions))  # (B, T, T)
    left = op.squeeze(op.sum(op.mul(directions, directions), 2), 2)  # (B, T): squared distance to the chosen span
    if task.padded:  # after every token, before those chosen
        left = op.sub(left, op.squeeze(op.mul(absent_rows(op, plain), 2.0), 2))
    steps = np.eye(keep, dtype=np.float32)[:, None, None, :]  # one (1, 1, K) a step: its column of the factors
    rows: V | None = None  # (B, T, K): column i is the kernel's row of choice i, less what the choices before explain
    scaled: V | None = None  # the same over that choice's own squared distance
    picks: list[V] = []
    for number in range(keep):
        pick = op.best(op.round(op.mul(left, LEVELS)))  # (B, 1)
        picks.append(pick)
        if number == keep - 1:
            break
        row = op.row(kernel, pick)  # (B, T)
        if rows is not None and scaled is not None:
            explained = op.matmul(scaled, op.unsqueeze(op.row(rows, pick), 2))  # (B, T, 1)
            row = op.sub(row, op.squeeze(explained, 2))
        own = op.maximum(op.row(op.unsqueeze(left, 2), pick), 1.0 / LEVELS)  # (B, 1); below, nothing is left to explain
        part = op.div(row, own)
        taken = op.squeeze(op.hits([pick], task.tokens), 1)  # (B, T): never the largest again
        left = op.sub(op.sub(left, op.mul(row, part)), op.mul(taken, 4.0))
        column = op.mul(op.unsqueeze(row, 2), steps[number])
        scaled_column = op.mul(op.unsqueeze(part, 2), steps[number])
        rows = column if rows is None else op.add(rows, column)
        scaled = scaled_column if scaled is None else op.add(scaled, scaled_column)
    return op.add(points_of(op, picks, task.tokens), nothing(op, tokens))
