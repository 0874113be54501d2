"""Leverage scores of the r leading left singular vectors, in float32 matrix products only.

l_t = (1/r) sum_{j<=r} U[t,j]^2 for F = U S V^T (SVD-Prune, arXiv 2604.11530). No engine has an SVD, so:
1. Block power iteration between the two sides of F, thin blocks only: V <- orth(F^T orth(F V)). Going half a step at a
   time spreads the block by singular values instead of their squares, which float32 and few polar steps can hold.
2. `orth` is the orthogonal polar factor by odd cubics (`polynomials`): any block width, no factorisation.
3. Rayleigh-Ritz without eigenvectors: T = Q^T F F^T Q is b x b, and the scores diag(Q P Q^T) need only its spectral
   projector P on the r leading directions (`projector`).

NaN or infinity anywhere in a picture makes all its scores NaN; other pictures of the batch are not touched.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.polynomials import sign_steps
from svdprune.exporter.selection.projector import leading_projector
from svdprune.exporter.selection.registry import Task, register
from svdprune.runtime.errors import UserError

TINY = 1e-30  # keeps an all-zero picture from dividing 0 by 0; far below anything that normalised features hold

# (lower bound of the singular values, cubics): a rough polar factor between half steps, where only the conditioning
# matters, and an exact one for the basis that the scores are read from. Singular values below the bound come out too
# small, which drops directions from the tail of the block first.
ROUGH = (1e-3, 6)
EXACT = (5e-4, 11)

TIE = 2.0**-15  # scores closer than this, relatively, are equal: identical tokens must not be ordered by rounding


@register("leverage", any_keep=True, padding=True, by_leverage=True)
def leverage(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Leverage scores (B, T) that sum to 1; nearly equal ones made equal (`merge_ties`)."""
    features = op.div(tokens, op.add(op.max(op.abs(tokens), 1, 2), TINY))  # (B, T, D), safe to square
    if task.config.centre and task.padded:
        present = op.at_least(op.max(op.abs(features), 2), TINY)  # (B, T, 1)
        mean = op.div(op.sum(features, 1), op.add(op.sum(present, 1), TINY))
        features = op.mul(op.sub(features, mean), present)
    elif task.config.centre:
        features = op.sub(features, op.mean(features, 1))
    if task.config.variance is not None:
        features = _unit(op, features)  # total variance 1, so every squared singular value is a share of it
    start = start_block(task)
    basis, small = range_finder(op, features, start, task.config.rounds)  # (B, T, b), (B, b, b)
    columns = start.shape[1]
    leading = leading_projector(op, small, columns, task.config.rank_limit(columns), task.config.variance)  # (B, b, b)
    scores = op.squeeze(op.sum(op.mul(op.matmul(basis, leading), basis), 2), 2)  # (B, T)
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
