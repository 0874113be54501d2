"""What the vision graph takes for a cut picture, and what its choice means among the picture's candidates."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from svdprune.runtime.errors import BundleError
from svdprune.runtime.tiling import Cut, TilesInfo

ABSENT = -1


@dataclass(frozen=True)
class Slots:
    """Candidates laid out for G choices of S slots each.

    Attributes:
        sources: int64 [G, S, R]. weights: float32 [G, S, R], all 0 in a slot that is empty.
        candidates: int64 [G, S], -1 in an empty slot.
        extras: more inputs of the graph, by name: float32 [N, ...] for N tiles.
    """

    sources: np.ndarray
    weights: np.ndarray
    candidates: np.ndarray
    extras: dict[str, np.ndarray] = field(default_factory=dict)


def lay_out(cut: Cut, tiles: TilesInfo, size: int) -> Slots:
    """Put the candidates into slots: all into one group of ``size``, or those of each tile into a group.

    Raises:
        BundleError: more tiles or candidates than the vision graph takes.
    """
    count = len(cut.pixels)
    if not tiles.least <= count <= tiles.most:
        raise BundleError(
            f"the picture makes {count} tiles, the vision graph takes {tiles.least} to {tiles.most}: "
            "export the bundle again"
        )
    groups = [np.arange(len(cut.places))]
    if tiles.budget == "tile":
        groups = [np.flatnonzero(cut.tile == number) for number in range(count)]
    if max(map(len, groups)) > size or cut.sources.shape[1] > tiles.sources:
        raise BundleError(f"the picture has more tokens than the {size} that the vision graph takes: export it again")
    shape = (len(groups), size, tiles.sources)
    absent = np.full(shape[:2], ABSENT, np.int64)
    slots = Slots(np.zeros(shape, np.int64), np.zeros(shape, np.float32), absent, cut.extras)
    wide = cut.sources.shape[1]
    for number, group in enumerate(groups):
        slots.sources[number, : len(group), :wide] = cut.sources[group]
        slots.weights[number, : len(group), :wide] = cut.weights[group]
        slots.candidates[number, : len(group)] = group
    return slots


@dataclass(frozen=True)
class Chosen:
    """The kept candidates.

    Attributes:
        kept: int64 [k], ascending. features: float32 [k, H]. scores: float32 [n], of all.
        deepstack: float32 [L, k, H], or None.
    """

    kept: np.ndarray
    features: np.ndarray
    scores: np.ndarray
    deepstack: np.ndarray | None = None


def chosen(
    slots: Slots,
    features: np.ndarray,
    kept: np.ndarray,
    scores: np.ndarray,
    count: int,
    deepstack: np.ndarray | None = None,
) -> Chosen:
    """Drop the empty slots and bring what is left into the order of the prompt.

    Args:
        features: float32 [G, K, H]; kept: int64 [G, K]; scores: float32 [G, S]; deepstack: float32 [G, L, K, H] or
            None: of the vision graph.
        count: n, how many candidates there are.
    """
    found = np.take_along_axis(slots.candidates, kept, 1).ravel()
    order = np.argsort(found, kind="stable")
    order = order[found[order] != ABSENT]
    filled = slots.candidates != ABSENT
    all_scores = np.zeros(count, np.float32)
    all_scores[slots.candidates[filled]] = scores[filled]
    rows = features.reshape(-1, features.shape[2])[order]
    levels = None
    if deepstack is not None:
        first = np.moveaxis(deepstack, 1, 0)  # [L, G, K, H]
        levels = np.ascontiguousarray(first.reshape(len(first), -1, first.shape[3])[:, order])
    return Chosen(found[order], rows, all_scores, levels)
