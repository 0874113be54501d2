"""The orthogonal polar factor of a thin block in matrix products: what orthonormalises it here, since no engine has QR.

X <- X (gain I - X^T X) for the gains of `polynomials`, in one of two forms with the same result but for rounding:
on a GPU each step is two kernels on the block itself, the fewest there can be; on a CPU, where arithmetic is what
costs, the steps are taken by the b x b matrix Y = X^T X, which they change to M Y M with M = gain I - Y, and the
product of some M in a row meets the block at once.
"""

from __future__ import annotations

import numpy as np

from svdprune.exporter.selection.ops import Ops, V
from svdprune.exporter.selection.polynomials import sign_steps

TINY = 1e-30  # keeps a block of zeros from dividing 0 by 0

# (lower bound of the singular values, cubics): a rough polar factor between half steps, where only the conditioning
# matters, and an exact one for the basis that the scores are read from. Singular values below the bound come out too
# small, which drops directions from the tail of the block first.
ROUGH = (1e-3, 6)
EXACT = (5e-4, 11)

# Steps by Y before it is computed anew. Rounding leaves Y eigenvalues a little below 0, about -1e-7, where the block
# has fewer directions than columns: six steps at most make -0.1 of them, a few more would make them grow without end.
BY_GRAM = 6


def orthonormal(op: Ops[V], block: V, columns: int, lower: float, count: int, gpu: bool, divisor: V | None = None) -> V:
    """Orthogonal polar factor of (B, n, b): singular values from `lower` times the Frobenius norm up become 1.

    With a `divisor` (B, 1, 1), all of it divided by that.
    """
    scale, gains = sign_steps(lower, count)
    identity = np.eye(columns, dtype=np.float32)
    return (_on_block if gpu else _by_gram)(op, block, identity, scale, gains, divisor)


def _on_block(
    op: Ops[V], block: V, identity: np.ndarray, scale: float, gains: tuple[float, ...], divisor: V | None
) -> V:
    block = op.div(block, op.mul(op.add(op.norm(block, 1, 2), TINY), 1.0 / scale))
    for number, gain in enumerate(gains):
        factor = op.sub(gain * identity, op.matmul(op.transpose(block), block))
        if divisor is not None and number == len(gains) - 1:
            factor = op.div(factor, divisor)
        block = op.matmul(block, factor)
    return block


def _by_gram(
    op: Ops[V], block: V, identity: np.ndarray, scale: float, gains: tuple[float, ...], divisor: V | None
) -> V:
    for first in range(0, len(gains), BY_GRAM):
        gram = op.matmul(op.transpose(block), block)  # Y
        shrink = None
        if first == 0:  # Y's trace is the square of the block's norm
            shrink = op.mul(op.sqrt(op.add(op.sum(op.mul(gram, identity), 1, 2), TINY)), 1.0 / scale)
            gram = op.div(gram, op.mul(shrink, shrink))
        factor = product = op.sub(gains[first] * identity, gram)  # M, and the product of all
        for gain in gains[first + 1 : first + BY_GRAM]:
            gram = op.matmul(op.matmul(factor, gram), factor)
            factor = op.sub(gain * identity, gram)
            product = op.matmul(product, factor)
        if divisor is not None and first + BY_GRAM >= len(gains):
            shrink = divisor if shrink is None else op.mul(shrink, divisor)
        block = op.matmul(block, product if shrink is None else op.div(product, shrink))
    return block
