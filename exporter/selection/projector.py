"""The spectral projector of a small symmetric matrix onto its leading directions, without an eigenvector.

Purification with a steered trace (Niklasson, Physical Review B 66, 155115, 2002, made for density matrices): start from
X = T / tr T, whose spectrum lies in [0, 1], and let each step be X <- 2X - X^2, which lifts every eigenvalue, or
X <- X^2, which lowers them; choose by whether X holds fewer directions than wanted, tr X < r, or not. All eigenvalues
of X end at 0 or 1 and the leading r of T at 1: their order never changes. A step is one product of b x b matrices, and
no eigenvalue, gap or cut has to be known. Its depth depends on neither r nor b.

The paper's variance rule steers by the energy tr(X T) instead, so each picture gets its own rank inside the graph.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V

# Steps that may lift before any step has lowered: Ritz values below about 2^-18 of the trace are float32's noise and
# must not be lifted into the count where the features have fewer directions than wanted.
LIFTS = 20
STEPS = 36  # measured: from 32 on, the same tokens as with an exact eigendecomposition (docs/fidelity.md)
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
    captured = op.sum(op.mul(small, identity), 1, 2)  # (B, 1, 1)
    state = op.div(small, op.add(op.mul(captured, ROOM), TINY))
    pulls: list[V] = []
    lift: V | float = 1.0
    for step in range(STEPS):
        wanted = rank + (SWAY if step % 2 else -SWAY)
        if step == LIFTS:  # 0 where all steps have lifted and there still was not enough: leave it at that
            lift = op.choose(op.total(pulls), LIFTS - 0.5, 0.0, 1.0)
        pull = op.choose(op.sum(op.mul(state, identity), 1, 2), wanted, -1.0, lift)
        if variance is not None:
            pull = op.choose(op.sum(op.mul(state, small), 1, 2), variance, -1.0, pull)
        pulls.append(pull)
        state = _pulled(op, state, pull)
    if variance is not None:
        for _ in range(WHOLE):
            state = _pulled(op, state, None)
    for _ in range(POLISH):
        square = op.matmul(state, state)
        state = op.matmul(square, op.sub(3.0 * identity, op.mul(state, 2.0)))
    return state


def _pulled(op: Ops[V], state: V, pull: V | None) -> V:
    """X + pull (X - X^2); None for a pull of 1."""
    change = op.sub(state, op.matmul(state, state))
    return op.add(state, change if pull is None else op.mul(change, pull))
