"""The next token from the logits: greedy, or drawn after temperature, top-k and top-p, in that order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from svdprune.runtime.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 is greedy; else the logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach p; 1 keeps all.
        seed: of ``numpy.random.default_rng``; None draws differently each time.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}, it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, it must be more than 0 and at most 1 (off)")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed}, it must be 0 or more")


class Sampler:
    """Draws tokens for one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # Only where something is drawn: numpy.random is a slow import
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None

    def pick(self, logits: np.ndarray) -> int:
        """A token id from float32 logits [V]; ties of the greedy choice go to the lowest id."""
        if self._random is None:
            return int(np.argmax(logits))
        return int(self._random.choice(len(logits), p=probabilities(logits, self._sampling)))


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What is drawn from: float64 [V] that sums to 1, zero for the tokens left out (temperature above 0).

    The order and the edges are those of transformers' warpers: temperature, then top-k (ties of the k-th stay), then
    top-p over what is left (at least one token stays).
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        smallest = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled[scaled < smallest] = -np.inf
    chances = _softmax(scaled)
    if sampling.top_p < 1:
        order = np.argsort(chances, kind="stable")
        unlikely = order[np.cumsum(chances[order]) <= 1 - sampling.top_p]
        unlikely = unlikely[unlikely != order[-1]]
        scaled[unlikely] = -np.inf
        chances = _softmax(scaled)
    return chances


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()
