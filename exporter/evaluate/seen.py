"""A picture after the encoder, and as the language model gets it: the same for one picture as for tiles of one.

A *candidate* is a token that the unpruned prompt would hold. A picture that is not cut has its T tokens, row by row.
A picture in tiles has those of its `Cut`, each a weighted sum of the tiles' tokens, laid out in `Slots` for G choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from svdprune.exporter.selection import keep_indices
from svdprune.exporter.tiled import EMPTY
from svdprune.runtime.manifest import Positions
from svdprune.runtime.positions import Span
from svdprune.runtime.tiling import Cut
from svdprune.runtime.tiling.slots import ABSENT, Slots

Tap = tuple[torch.Tensor, torch.Tensor | None]
"""Features (G, S, D) to be scored, and the [CLS] attention (G, S), None where the encoder has no [CLS]."""


@dataclass
class Seen:
    """One encoded picture: what G choices of S tokens are made from, at the checkpoint's tap and at others.

    Attributes:
        tokens, attention: at the checkpoint's own tap; G is 1 and S is T where the picture is not cut.
        flat: the encoder's tokens (N * T, D) of all tiles.
        taps: the same at other taps, by name.
        cut, slots: of a picture in tiles, otherwise None.
    """

    tokens: torch.Tensor
    attention: torch.Tensor | None
    flat: torch.Tensor
    taps: dict[int | str, Tap] = field(default_factory=dict)
    cut: Cut | None = None
    slots: Slots | None = None

    @property
    def count(self) -> int:
        """How many candidates the picture has."""
        return int(self.tokens.shape[1]) if self.cut is None else len(self.cut.places)

    @property
    def everything(self) -> np.ndarray:
        """All candidates, int64 (n,)."""
        return np.arange(self.count, dtype=np.int64)

    def at(self, tap: int | str | None) -> Tap:
        """Features and attention to be scored."""
        return (self.tokens, self.attention) if tap is None else self.taps[tap]

    def matrices(self, tap: int | str | None = None) -> list[np.ndarray]:
        """What each choice decomposes: its candidates' features, float32 (n, D), empty slots left out."""
        groups = self.at(tap)[0].float().cpu().numpy()
        if self.slots is None:
            return list(groups)
        present = self.slots.candidates != ABSENT
        return [group[row] for group, row in zip(groups, present, strict=True) if row.any()]

    def spread(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """Scores (G, S) from those of each of `matrices`, (n,); 0 in empty slots."""
        if self.slots is None:
            return np.stack(scores)
        present = self.slots.candidates != ABSENT
        found = np.zeros(present.shape)
        for group, row in zip(np.flatnonzero(present.any(1)), scores, strict=True):
            found[group, present[group]] = row
        return found

    def choose(self, scores: np.ndarray, keep: int) -> np.ndarray:
        """The candidates that K = `keep` of each choice's scores (G, S), or (1, S) for all, leave: int64, ascending.

        Raises:
            NumericalError: scores that are not finite.
        """
        if self.slots is None:
            return keep_indices(scores[0], keep)
        candidates = self.slots.candidates
        best = keep_indices(np.where(candidates == ABSENT, EMPTY, scores), keep)
        found = np.take_along_axis(candidates, best, 1).ravel()
        return np.sort(found[found != ABSENT])

    def gathered(self, flat: torch.Tensor) -> torch.Tensor:
        """Rows (G, S, ...) of the candidates from rows (N * T, ...) of the tiles' tokens; zeros in empty slots."""
        if self.slots is None:
            return flat[None]
        return mixed(flat, self.slots.sources, self.slots.weights)

    def mixture(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources int64 and weights float32, (k, R), of candidates."""
        if self.cut is None:
            return kept[:, None], np.ones((len(kept), 1), np.float32)
        return self.cut.sources[kept], self.cut.weights[kept]


def mixed(flat: torch.Tensor, sources: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Weighted sums, float32, of rows of `flat` (n, ...) by `sources` and `weights` (..., R)."""
    index = torch.from_numpy(sources).to(flat.device)
    share = torch.from_numpy(weights).to(flat.device)
    found: torch.Tensor = flat[index].float()  # (..., R) and the shape of a row
    wide = share.reshape(*share.shape, *[1] * (found.ndim - share.ndim))
    return (found * wide).sum(share.ndim - 1)


@dataclass(frozen=True)
class View:
    """A picture as the language model gets it.

    `rows` (r, H): of kept tokens, and of marks between them. `span`: which of the unpruned picture's rows they are;
    `positions` says how they are numbered.
    """

    rows: torch.Tensor
    span: Span
    positions: Positions
