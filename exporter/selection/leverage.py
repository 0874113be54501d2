"""Leverage scores of the r leading left singular vectors, in float32 matrix products only.

l_t = (1/r) sum_{j<=r} U[t,j]^2 for F = U S V^T (SVD-Prune, arXiv 2604.11530). No engine has an SVD, so:
1. Block power iteration between the two sides of F, thin blocks only: V <- orth(F^T orth(F V)). Going half a step at a
   time spreads the block by singular values instead of their squares, which float32 and few polar steps can hold. It
   begins with a sketch of the tokens (`sketch`), or with a block of channels (`start_block`).
2. `orth` is the orthogonal polar factor (`polar`): any block width, no factorisation.
3. Rayleigh-Ritz without eigenvectors: T = Q^T F F^T Q is b x b, and the scores diag(Q P Q^T) need only its spectral
   projector P on the r leading directions (`projector`).

NaN or infinity anywhere in a picture makes all its scores NaN; other pictures of the batch are not touched.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.polar import EXACT, ROUGH, orthonormal
from svdprune.exporter.selection.projector import leading_projector
from svdprune.exporter.selection.registry import Task, register
from svdprune.runtime.errors import UserError

TINY = 1e-30  # keeps an all-zero picture from dividing 0 by 0; far below anything that normalised features hold

TIE = 2.0**-15  # scores closer than this, relatively, are equal: identical tokens must not be ordered by rounding

SHARED = 4  # tokens that a column of the sketch sums at least: of fewer, the block of channels is as good a start


@register("leverage", any_keep=True, padding=True, by_leverage=True)
def leverage(op: Ops[V], tokens: V, cls_attention: V | None, task: Task) -> V:
    """Leverage scores (B, T) that sum to 1; nearly equal ones made equal (`merge_ties`)."""
    config = task.config
    features = tokens  # (B, T, D)
    if config.centre or config.variance is not None:  # safe to square
        features = op.div(features, op.add(op.max(op.abs(features), 1, 2), TINY))
    if config.centre and task.padded:
        present = op.at_least(op.max(op.abs(features), 2), TINY)  # (B, T, 1)
        mean = op.div(op.sum(features, 1), op.add(op.sum(present, 1), TINY))
        features = op.mul(op.sub(features, mean), present)
    elif config.centre:
        features = op.sub(features, op.mean(features, 1))
    if config.variance is not None:  # total variance 1, so every squared singular value is a share of it
        features = op.div(features, op.add(op.norm(features, 1, 2), TINY))
    basis, small = range_finder(op, features, task)  # (B, T, b), (B, b, b)
    columns = config.columns(task.tokens, task.channels)
    leading = leading_projector(op, small, columns, config.rank_limit(columns), config.variance)  # (B, b, b)
    scores = op.squeeze(op.sum(op.mul(op.matmul(basis, leading), basis), 2), 2)  # (B, T)
    return merge_ties(op, scores)


def range_finder(op: Ops[V], features: V, task: Task) -> tuple[V, V]:
    """Q (B, T, b), orthonormal, near the leading left singular space of F (B, T, D), and T = Q^T F F^T Q (B, b, b).

    T is that of F divided by a number of each picture's, except under the variance rule, which needs its scale.
    """
    columns, from_tokens = task.config.columns(task.tokens, task.channels), sketched(task)
    turned = op.transpose(features)  # (B, D, T)
    block = sketch(op, features, task) if from_tokens else op.matmul(features, start_block(task))
    # Blocks have to be safe to square. F's own size is read off its first product, which is thin, and the blocks that F
    # is multiplied with are divided by it: F itself would have to be read and written once more.
    size: V | None = None
    if task.config.variance is None:
        size = op.max(op.abs(block), 1, 2)  # (B, 1, 1)
        size = op.choose(size, TINY, size, 1.0)
        block = op.div(block, size)
    # F^T S takes the place of the first round's product with F^T
    left = op.matmul(features, orthonormal(op, block, columns, *ROUGH, task.gpu, size)) if from_tokens else block
    for _ in range(task.config.rounds - from_tokens):
        right = op.matmul(turned, orthonormal(op, left, columns, *ROUGH, task.gpu, size))  # (B, D, b)
        left = op.matmul(features, orthonormal(op, right, columns, *ROUGH, task.gpu, size))  # (B, T, b)
    basis = orthonormal(op, left, columns, *EXACT, task.gpu)
    image = op.matmul(turned, basis)  # (B, D, b)
    if size is not None:
        image = op.div(image, size)
    return basis, op.matmul(op.transpose(image), image)


def sketched(task: Task) -> bool:
    """Whether the iteration begins with a sketch of the tokens.

    Not with a calibrated start, and not where rows of zeros are in between: the sketch of a picture, and with it the
    last bits of its scores, would depend on how many.
    """
    columns = task.config.columns(task.tokens, task.channels)
    return task.start is None and not task.padded and task.tokens >= SHARED * columns


def sketch(op: Ops[V], features: V, task: Task) -> V:
    """F^T S (B, D, b), S seeded: each column the weighted sum of some neighbouring tokens, no token in two columns.

    A sparse embedding of the tokens (Clarkson and Woodruff, arXiv 1207.6365), at the cost of reading F once. The
    weights are random in size, too: signs alone add up to nothing where all tokens are the same.
    """
    columns = task.config.columns(task.tokens, task.channels)
    each = -(-task.tokens // columns)
    random = np.random.default_rng(task.config.seed)
    weights = random.choice([-1.0, 1.0], columns * each) * random.uniform(0.5, 1.5, columns * each)
    if missing := columns * each - task.tokens:
        features = op.zero_rows(features, missing)
    groups = op.reshape(features, columns, each, task.channels)
    sums = op.matmul(op.constant(weights.reshape(1, columns, 1, each)), groups)  # (B, b, 1, D)
    return op.transpose(op.reshape(sums, columns, task.channels))


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
