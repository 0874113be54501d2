"""Muon in float32.

`torch.optim.Muon` orthogonalises in bfloat16, which a CPU without bfloat16 units emulates some eighty
times slower than float32; the update rule is the same.
Rule: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the
RMS-matching scale of J. Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of the Newton-Schulz iteration


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values land in about [0.7, 1.2]. (m, n) -> (m, n)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for weight matrices; its learning rate is on AdamW's scale."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        threads: int = 1,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = ThreadPoolExecutor(threads)  # matrices are independent: one each

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            list(self.pool.map(lambda p, g=group: self._update(p, g), with_gradient))

    @torch.no_grad()
    def _update(self, p: torch.nn.Parameter, group: dict[str, float]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        velocity = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        nesterov = p.grad.lerp(velocity, group["momentum"])  # type: ignore[union-attr]
        update = orthogonalise(nesterov.flatten(1)).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * max(p.flatten(1).shape) ** 0.5)
