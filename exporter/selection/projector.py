"""The spectral projector of a small symmetric matrix onto its leading directions, without an eigenvector.

Purification with a steered trace (Niklasson, Physical Review B 66, 155115, 2002, made for density matrices): start from
X = T / tr T, whose spectrum lies in [0, 1], and let each step be X <- 2X - X^2, which lifts every eigenvalue, or
X <- X^2, which lowers them; choose by whether X holds fewer directions than wanted, tr X < r, or not. All eigenvalues
of X end at 0 or 1 and the leading r of T at 1: their order never changes. A step is one product of b x b matrices, and
no eigenvalue, gap or cut has to be known. The depth depends on neither r nor b.

The paper's variance rule steers by the energy tr(X T) as well, so each picture gets its own rank inside the graph.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V

# Steps that may lift before any step has lowered: Ritz values below about 2^-18 of the trace are float32's noise and
# must not be lifted into the count where the features have fewer directions than wanted.
LIFTS = 20
STEPS = 38  # measured: from 36 on, the same tokens as with an exact eigendecomposition (docs/fidelity.md)
VARIANCE_STEPS = 36
SMALL = 10  # steps of X itself, at first: the wanted eigenvalues may be too small for the digits of I - X
WHOLE = 6  # lifts that make a direction whole of which the variance rule wants a part
POLISH = 2  # steps 3X^2 - 2X^3, which send what is left between 0 and 1 to the nearer end
# The wanted trace is a little less and a little more, step about: at its end X then goes up and down in turn, which
# takes eigenvalues near 0 and 1 there; one way alone would carry their rounding errors off.
SWAY = 1.0 / 16.0
ROOM = 1.0001  # keeps the largest eigenvalue of X below 1, beyond which lowering would be lifting
TINY = 1e-30


def leading_projector(op: Ops[V], small: V, columns: int, rank: int, variance: float | None) -> V:
    """P (B, b, b), the projector of T (B, b, b) onto its `rank` leading directions.

    With `variance`, the fewest directions that hold this share of the total variance, which the caller has made 1;
    `rank` at most. Where the cut falls between equal eigenvalues, P holds some mixture of their directions.
    """
    identity = np.eye(columns, dtype=np.float32)
    start = op.div(small, op.add(op.mul(_trace(op, small, identity), ROOM), TINY))
    if variance is None:
        state = _by_rank(op, start, identity, rank)
    else:
        state = _by_variance(op, start, small, identity, rank, variance)
    for _ in range(POLISH):
        square = op.matmul(state, state)
        state = op.matmul(square, op.sub(3.0 * identity, op.mul(state, 2.0)))
    return state


def _by_rank(op: Ops[V], state: V, identity: np.ndarray, rank: int) -> V:
    """X after all steps, which go two at a time in one direction: half the traces to take.

    After the first steps, what is carried along is Z, which is X where the sign is 1 and I - X where it is -1, so that
    a double step is Z <- Z^4 in either direction, after exchanging the two where the direction is a new one.
    """
    sign: V | float = 1.0
    signs: list[V] = []  # directions so far; 1 lowers
    stay: V | None = None
    half = len(identity) / 2.0
    sure = _sure_lifts(rank)
    for _ in range(2 * sure):
        state = _stepped(op, state, -1.0)
    for step in range(sure, STEPS // 2):
        wanted = rank + (SWAY if step % 2 else -SWAY)
        beyond = op.mul(op.sub(_trace(op, state, identity), half), sign)  # tr X - b / 2
        direction = op.choose(beyond, wanted - half, 1.0, -1.0)
        signs.append(direction)
        if step == LIFTS // 2:  # where all steps have lifted and there still is not enough: up and down from here on
            stay = op.choose(op.total(signs), 0.5 - len(signs), 0.0, 1.0)
        if step < SMALL // 2:
            state = _stepped(op, _stepped(op, state, direction), direction)
            continue
        if stay is not None:
            direction = op.choose(stay, 0.5, -1.0 if step % 2 else 1.0, direction)
        state = op.choose(op.mul(direction, sign), 0.0, state, op.sub(identity, state))
        square = op.matmul(state, state)
        state, sign = op.matmul(square, square), direction
    return op.choose(direction, 0.0, state, op.sub(identity, state))


def _by_variance(op: Ops[V], state: V, small: V, identity: np.ndarray, rank: int, variance: float) -> V:
    """X after all steps, one at a time: a part of a direction, as the rule may want, would swing too far in two."""
    signs: list[V] = []
    lift: V | float = -1.0
    for step in range(VARIANCE_STEPS):
        if step == LIFTS:  # 0 where all steps have lifted and there still was not enough: leave it at that
            lift = op.choose(op.total(signs), 0.5 - len(signs), -1.0, 0.0)
        wanted = rank + (SWAY if step % 2 else -SWAY)
        direction = op.choose(_trace(op, state, identity), wanted, 1.0, lift)
        direction = op.choose(op.sum(op.mul(state, small), 1, 2), variance, 1.0, direction)
        signs.append(direction)
        state = _stepped(op, state, direction)
    for _ in range(WHOLE):
        state = _stepped(op, state, -1.0)
    return state


def _sure_lifts(rank: int) -> int:
    """First double steps that lift whatever the matrix: each at most multiplies the trace, 1 at first, by 4."""
    steps = 0
    while 4**steps < rank - SWAY:
        steps += 1
    return min(steps, SMALL // 2 - 1)


def _trace(op: Ops[V], matrix: V, identity: np.ndarray) -> V:
    return op.sum(op.mul(matrix, identity), 1, 2)  # (B, 1, 1)


def _stepped(op: Ops[V], matrix: V, direction: V | float) -> V:
    """X^2 where the direction is 1, 2X - X^2 where it is -1, X where it is 0."""
    return op.sub(matrix, op.mul(op.sub(matrix, op.matmul(matrix, matrix)), direction))
