"""How far two runs of the same thing are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from svdprune.runtime.engines.adapter import RUNTIMES
from svdprune.runtime.errors import BundleError
from svdprune.runtime.manifest import Manifest

Limits = TypeVar("Limits", "VisionLimits", "DecoderLimits")


@dataclass(frozen=True)
class VisionLimits:
    """What the vision stage may differ by.

    Attributes:
        cosine: least cosine of any kept token's features with the reference's.
        overlap: least share of kept tokens that the reference keeps, too.
        tie: scores closer than this share of the lowest kept one count as equal, and either token as kept.
    """

    cosine: float
    overlap: float
    tie: float


@dataclass(frozen=True)
class DecoderLimits:
    """What the first step's logits may differ by.

    Attributes:
        cosine: least cosine of the logits.
        rank: the reference's best token is among this many best.
        answer: whether the answer must be the reference's token for token.
    """

    cosine: float
    rank: int
    answer: bool


VISION_LIMITS = {
    "fp32": VisionLimits(0.9999, 1.0, 1e-3),
    "fp16": VisionLimits(0.995, 0.9, 1e-2),
    "int8": VisionLimits(0.95, 0.7, 2e-2),
    "fp8": VisionLimits(0.95, 0.7, 2e-2),
}
DECODER_LIMITS = {
    "fp32": DecoderLimits(0.9999, 1, True),
    "fp16": DecoderLimits(0.995, 2, False),
    "int4": DecoderLimits(0.95, 3, False),
}


def decoder_precision(manifest: Manifest, backend: str) -> str:
    """The precision of what the decoder ``backend`` runs: engines are built from a graph of their own."""
    engine = manifest.decoder.engine
    return engine.precision if engine is not None and backend in RUNTIMES else manifest.decoder.precision


def limits_for(table: dict[str, Limits], precision: str) -> Limits:
    """The row of ``VISION_LIMITS`` or ``DECODER_LIMITS`` for a precision.

    Raises:
        BundleError: the bundle has a precision that this svdprune does not know.
    """
    if precision not in table:
        raise BundleError(f"no tolerance is known for the precision {precision}: upgrade svdprune")
    return table[precision]


def kept_overlap(kept: np.ndarray, reference: np.ndarray, scores: np.ndarray, tie: float) -> float:
    """Share of the tokens ``kept`` int [K] that the reference keeps, or that tie with its last one.

    Two tokens whose scores differ in the last digits may swap from one machine to the next; that harms nothing.

    Args:
        kept, reference: indices.
        scores: float [T], the reference's.
        tie: a token counts when its score is at least (1 - tie) times the lowest score in ``reference``.
    """
    lowest = scores[reference].min()
    fits = np.isin(kept, reference) | (scores[kept] >= lowest - tie * abs(lowest))
    return float(fits.mean())


def cosines(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cosine of each row of two arrays [n, H], float64 [n]; 0 where a row is zero, 1 where both are."""
    a, b = rows.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0))
