"""Coefficients of the odd cubics whose composition is the sign of a number, or the polar factor of a matrix.

With p_1, ..., p_n applied one after the other, every singular value in [lower, 1] arrives near 1:
X <- X (a I + c X^T X) step by step. For a symmetric X it is the matrix sign function.
The cubics are the minimax choice at each step (Chen and Chow, "A stable scaling of Newton-Schulz for improving the
sign function computation of a Hermitian matrix", 2014; of higher degree: Amsel et al., "The Polar Express", arXiv
2505.16932). Degree 3 costs least nodes for each factor of growth: 5.2 in four, against 8.5 in six for degree 5.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache
def sign_steps(lower: float, count: int) -> tuple[float, tuple[float, ...]]:
    """`count` cubics for singular values in [lower, 1].

    Returns:
        (scale, gains): start from scale * X, then X <- X (gain I - X^T X) for each gain. The factors before the cubic
        terms are folded into the scale of X, which spares one multiplication a step.
    """
    cubics = []
    low, high = lower, 1.0
    for _ in range(count):
        # p(x) = k (s x - x^3) with p(low) = p(high) = 1 - e and its peak, at sqrt(s / 3), 1 + e
        s = low * low + low * high + high * high
        peak = 2.0 * (s / 3.0) ** 1.5
        ends = s * low - low**3
        k = 2.0 / (peak + ends)
        cubics.append((k * s, k))
        low, high = k * ends, k * peak
    # Carry X = t x with t of each step such that the factor of X^3 is 1, that is t^3 = k t'; the last t is 1.
    scales = [1.0]
    for _, k in reversed(cubics):
        scales.insert(0, (k * scales[0]) ** (1.0 / 3.0))
    gains = tuple(a * scales[i + 1] / scales[i] for i, (a, _) in enumerate(cubics))
    return scales[0], gains
