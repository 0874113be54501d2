"""How few iterations, and how narrow a block, keep the tokens that a float64 SVD keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from svdprune.calib.calibration import Trial
from svdprune.calib.search import cheapest
from svdprune.exporter.estimate.counting import selection_work
from svdprune.exporter.families import VisionSpec
from svdprune.exporter.selection import SelectorConfig, build_selector, keep_indices, reference_scores
from svdprune.runtime.roofline import Work

CALIBRATED, SEEDED = "calibrated", "seeded"
ITERATIONS = 6  # the most that are tried
WIDTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the block, in ranks
ROUND_TO = 8  # columns


def block_widths(rank: int, limit: int) -> list[int]:
    """Blocks worth trying, ascending: from the rank to six times as many columns, at most `limit` = min(T, D)."""
    widths = {rank}
    widths |= {-(-round(rank * width) // ROUND_TO) * ROUND_TO for width in WIDTHS}
    return sorted({min(width, limit) for width in widths if width >= rank})


@dataclass
class Exact:
    """Matrices of features (n, D) and what a float64 SVD keeps of each, for each K.

    `size`: T and D of the selector in the graph. `padded`: n varies, and the graph has rows of zeros in place of the
    T - n that are missing.
    """

    features: list[np.ndarray]
    kept: list[dict[int, np.ndarray]]
    size: tuple[int, int]
    padded: bool

    @staticmethod
    def of(features: Sequence[np.ndarray], config: SelectorConfig, keeps: Sequence[int], spec: VisionSpec) -> Exact:
        """Decompose each matrix once."""
        kept = []
        for picture in features:
            scores = reference_scores(config, picture)
            kept.append({keep: keep_indices(scores, min(keep, len(scores))) for keep in keeps})
        return Exact(list(features), kept, (spec.tokens, spec.channels), spec.tiling is not None)

    def trial(self, config: SelectorConfig, start: np.ndarray | None) -> Trial:
        """The selector of the graph, in torch and float32, against that."""
        tokens, channels = self.size
        scorer = build_selector(config, tokens, channels, start=start, padded=self.padded)
        shares: dict[int, list[float]] = {keep: [] for keep in self.kept[0]}
        for picture, exact in zip(self.features, self.kept, strict=True):
            rows = np.zeros(self.size, np.float32)
            rows[: len(picture)] = picture
            scores = scorer(torch.from_numpy(rows)[None])[0].numpy()[: len(picture)]
            for keep, wanted in exact.items():
                found = keep_indices(scores, len(wanted))
                shares[keep].append(len(np.intersect1d(found, wanted)) / len(wanted))
        works = self._cost(config, tokens, channels, start)
        return Trial(
            config.rounds,
            config.columns(tokens, channels),
            SEEDED if start is None else CALIBRATED,
            min(float(np.mean(values)) for values in shares.values()),
            min(min(values) for values in shares.values()),
            sum(work.kernels for work in works),
            float(sum(work.flops for work in works)),
        )

    def _cost(self, config: SelectorConfig, tokens: int, channels: int, start: np.ndarray | None) -> list[Work]:
        keep, grid = min(self.kept[0]), (tokens, 1)
        return selection_work(config, tokens, channels, keep, 1, grid, gpu=True, start=start, padded=self.padded)


def fewest(
    exact: Exact, rank: int, centre: bool, start: np.ndarray, overlap: float, tell: Callable[[Trial], None]
) -> tuple[list[Trial], bool]:
    """Trials by iterations, then by block, until one reaches the overlap.

    Iterations come first: each adds kernels that wait for one another, a wider block only makes them larger.

    Returns:
        The trials in order, and whether the last reached it.
    """

    def measure(setting: tuple[int, int]) -> Trial:
        iterations, block = setting
        found = exact.trial(SelectorConfig(rank=rank, block=block, iterations=iterations, centre=centre), start)
        tell(found)
        return found

    settings = [(n, block) for n in range(1, ITERATIONS + 1) for block in block_widths(rank, min(exact.size))]
    tried, met = cheapest(settings, measure, lambda trial: trial.overlap >= overlap)
    return [trial for _, trial in tried], met
