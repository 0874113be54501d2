"""Leverage scores of the r leading left singular vectors, in float32 matrix products only.

l_t = (1/r) sum_{j<=r} U[t,j]^2 for F = U S V^T (SVD-Prune, arXiv 2604.11530). No engine has an SVD, so:
1. Block power iteration between the two sides of F, thin blocks only: V <- orth(F^T orth(F V)). Going half a step at a
   time spreads the block by singular values instead of their squares, which float32 and few polar steps can hold.
2. `orth` is the orthogonal polar factor by odd cubics (`polynomials`): any block width, no factorisation.
3. Rayleigh-Ritz without eigenvectors: T = Q^T F F^T Q is b x b, and the scores diag(Q P Q^T) need only its spectral
   projector P on the r leading directions, the matrix sign of T - mu I for any mu between Ritz values r and r + 1.
   a. T is replaced by a matrix that is logarithmic in its eigenvalues, sum_k [I - (I - T)^(2^k)], so that a gap of 1 %
      between small Ritz values is as wide as one between large ones; each term is one squaring.
   b. mu is found by trial: a row of candidates at once, as a batch; traces of the signs count the eigenvalues above
      each; the interval that holds Ritz values r and r + 1 is searched again, three times in all.
   Its depth depends on neither r nor b. The paper's variance rule is the same search with the energy tr(P T) as the
   criterion, so each picture gets its own rank inside the graph.

NaN or infinity anywhere in a picture makes all its scores NaN; other pictures of the batch are not touched.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.config import SelectorConfig
from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.polynomials import sign_steps
from svdprune.exporter.selection.registry import Task, register
from svdprune.runtime.errors import UserError

TINY = 1e-30  # keeps an all-zero picture from dividing 0 by 0; far below anything that normalised features hold

# (lower bound of the singular values, cubics): a rough polar factor between half steps, where only the conditioning
# matters, and an exact one for the basis that the scores are read from. Singular values below the bound come out too
# small, which drops directions from the tail of the block first.
ROUGH = (1e-3, 6)
EXACT = (3e-4, 12)

DOUBLINGS = 18  # terms of the logarithm: Ritz values below 2^-18 of the trace are float32's noise and never counted
CANDIDATES = 16  # trials of mu at once
SEARCHES = ((1e-2, 7), (2e-3, 9), (3e-4, 11))  # bound and cubics of each round's sign; CANDIDATES^3 places in all
SHARPNESS = 50.0  # weight exp(-50 miss^2) of a candidate whose count of directions misses r by `miss`

TIE = 2.0**-15  # scores closer than this, relatively, are equal: identical tokens must not be ordered by rounding


@register("leverage")
def leverage(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Leverage scores (B, T) that sum to 1; nearly equal ones made equal (`merge_ties`)."""
    features = op.div(tokens, op.add(op.max(op.abs(tokens), 1, 2), TINY))  # (B, T, D), safe to square
    if task.config.centre:
        features = op.sub(features, op.mean(features, 1))
    features = _unit(op, features)  # total variance 1, so every squared singular value is a share of it
    start = start_block(task)
    basis, small = range_finder(op, features, start, task.config.rounds)  # (B, T, b), (B, b, b)
    projector = leading_projector(op, small, start.shape[1], task.config)  # (B, b, b)
    scores = op.squeeze(op.sum(op.mul(op.matmul(basis, projector), basis), 2), 2)  # (B, T)
    return merge_ties(op, scores)


def start_block(task: Task) -> np.ndarray:
    """W, float32 (D, b) with orthonormal columns: the first of the calibrated start, or a seeded random block.

    The seeded block is a subsampled randomised cosine transform (Halko, Martinsson and Tropp, arXiv 0909.4061, section
    4.6): as good as Gaussian noise, orthonormal by formula, and the same on every machine.
    """
    columns, channels = task.config.columns(task.tokens, task.channels), task.channels
    if task.start is None:
        random = np.random.default_rng(task.config.seed)
        signs = random.choice([-1.0, 1.0], channels)[:, None]
        waves = np.sort(random.permutation(channels)[:columns])
        block = np.cos(np.pi / channels * (np.arange(channels)[:, None] + 0.5) * waves)
        return (signs * block * np.where(waves == 0, 1.0, 2.0**0.5) / channels**0.5).astype(np.float32)
    if task.start.ndim != 2 or task.start.shape[0] != task.channels or task.start.shape[1] < columns:
        raise UserError(
            f"the calibrated start has shape {task.start.shape} where ({task.channels}, {columns}) is needed: "
            "calibrate again for this model and block"
        )
    return np.ascontiguousarray(task.start[:, :columns], dtype=np.float32)


def range_finder(op: Ops[V], features: V, start: np.ndarray, rounds: int) -> tuple[V, V]:
    """Q (B, T, b), orthonormal, near the leading left singular space of F (B, T, D), and T = Q^T F F^T Q (B, b, b)."""
    columns = start.shape[1]
    turned = op.transpose(features)  # (B, D, T)
    left = op.matmul(features, start)  # (B, T, b)
    for _ in range(rounds):
        right = op.matmul(turned, orthonormal(op, left, columns, *ROUGH))  # (B, D, b)
        left = op.matmul(features, orthonormal(op, right, columns, *ROUGH))
    basis = orthonormal(op, left, columns, *EXACT)
    image = op.matmul(turned, basis)  # (B, D, b)
    return basis, op.matmul(op.transpose(image), image)


def orthonormal(op: Ops[V], block: V, columns: int, lower: float, count: int) -> V:
    """Orthogonal polar factor of (B, n, b): singular values from `lower` times the Frobenius norm up become 1."""
    scale, gains = sign_steps(lower, count)
    identity = np.eye(columns, dtype=np.float32)
    block = _unit(op, block, scale)
    for gain in gains:
        block = op.matmul(block, op.sub(gain * identity, op.matmul(op.transpose(block), block)))
    return block


def leading_projector(op: Ops[V], small: V, columns: int, config: SelectorConfig) -> V:
    """Twice the spectral projector of T (B, b, b) onto its leading directions: as many as `config` asks for.

    When no cut separates exactly r directions (r-th and next Ritz value equal within float32, or fewer than r above
    the noise), the nearest cuts are averaged, which treats equal directions alike.
    """
    identity = np.eye(columns, dtype=np.float32)
    distance = op.unsqueeze(_log_distance(op, small, identity), 1)  # (B, 1, b, b), spectrum in [0, DOUBLINGS]
    limit = 2.0 * config.rank_limit(columns) - columns  # the trace of a sign matrix with that many directions
    places = np.linspace(0.0, 1.0, CANDIDATES, dtype=np.float32)[None, :, None, None]
    low, step = op.constant(-0.5), op.constant(DOUBLINGS / (CANDIDATES - 1))
    cuts = op.constant(-0.5 + DOUBLINGS * places)  # (1, G, 1, 1), later (B, G, 1, 1)
    if config.variance is not None:
        captured = op.unsqueeze(op.sum(op.mul(small, identity), 1, 2), 1)  # (B, 1, 1, 1)
        wanted = op.sub(2.0 * config.variance, captured)  # tr(P T) >= variance, in terms of the sign matrix
        small = op.unsqueeze(small, 1)
    for number, (lower, count) in enumerate(SEARCHES):
        signs = _signs(op, cuts, distance, identity, lower, count)  # (B, G, b, b)
        traces = op.sum(op.mul(signs, identity), 2, 3)  # (B, G, 1, 1)
        reached = op.at_least(traces, limit - 1.0)
        target: V = op.constant(limit)
        if config.variance is not None:
            reached = op.maximum(reached, op.at_least(op.sum(op.mul(signs, small), 2, 3), wanted))
            # The fewest directions that reach the share: the smallest trace among the cuts that do. A cut upon an
            # eigenvalue counts a part of its direction, which is made whole: rounded up, but for rounding errors.
            fewest = op.min(op.add(traces, op.mul(op.sub(1.0, reached), 4.0 * columns)), 1)  # (B, 1, 1, 1)
            directions = op.round(op.add(op.mul(fewest, 0.5), 0.5 * columns + 0.4))
            target = op.sub(op.mul(directions, 2.0), columns)
        if number == len(SEARCHES) - 1:
            break
        # the new interval: from the last cut below the r-th eigenvalue to the first above the next one
        passed = op.at_least(traces, op.add(target, 1.0))
        first = op.maximum(op.sub(CANDIDATES - 1.0, op.sum(reached, 1)), 0.0)  # (B, 1, 1, 1)
        last = op.minimum(op.sub(float(CANDIDATES), op.sum(passed, 1)), CANDIDATES - 1.0)
        low = op.add(low, op.mul(step, first))
        width = op.mul(step, op.sub(last, first))
        step = op.mul(width, 1.0 / (CANDIDATES - 1))
        cuts = op.add(op.mul(width, places), low)
    miss = op.sub(traces, target)  # twice the directions too many
    weights = op.softmax(op.mul(op.mul(miss, miss), -SHARPNESS / 4.0), 1)  # (B, G, 1, 1)
    sign = op.squeeze(op.sum(op.mul(signs, weights), 1), 1)  # (B, b, b)
    return op.add(sign, identity)


def _log_distance(op: Ops[V], small: V, identity: np.ndarray) -> V:
    """sum_k (I - T / tr T)^(2^k): eigenvalue t of T becomes about log2 of tr T / t, DOUBLINGS at most."""
    trace = op.sum(op.mul(small, identity), 1, 2)
    power = op.sub(identity, op.div(small, op.add(trace, TINY)))
    powers = [power]
    for _ in range(DOUBLINGS - 1):
        power = op.matmul(power, power)
        powers.append(power)
    return op.total(powers)


def _signs(op: Ops[V], cuts: V, distance: V, identity: np.ndarray, lower: float, count: int) -> V:
    """Matrix signs of cut I - distance, (B, G, b, b): +1 for the directions nearer than the cut, -1 for the others."""
    scale, gains = sign_steps(lower, count)
    sign = op.mul(op.sub(op.mul(cuts, identity), distance), scale / (DOUBLINGS + 1.0))
    for gain in gains:
        sign = op.matmul(sign, op.sub(gain * identity, op.matmul(sign, sign)))
    return sign


def merge_ties(op: Ops[V], scores: V) -> V:
    """Scores (B, T) rounded to whole multiples of TIE in their logarithm, below the largest; they sum to 1.

    Products of the same numbers in another order differ in the last bits, so identical tokens get unequal scores by
    chance; after this, the lowest index is kept, on every backend.
    """
    scores = op.abs(scores)  # a zero may come out as -1e-9
    share = op.div(scores, op.add(op.max(scores, 1), TINY))
    steps = op.round(op.mul(op.log(op.add(share, TINY)), 1.0 / TIE))
    rounded = op.exp(op.mul(steps, TIE))
    return op.div(rounded, op.sum(rounded, 1))


def _unit(op: Ops[V], matrix: V, scale: float = 1.0) -> V:
    """Each matrix of a (B, n, m) batch to Frobenius norm `scale`; zero stays zero."""
    norm = op.add(op.norm(matrix, 1, 2), TINY)
    return op.div(matrix, norm if scale == 1.0 else op.mul(norm, 1.0 / scale))
