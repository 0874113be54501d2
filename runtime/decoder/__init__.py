"""Decoder backends: rows of embeddings in, logits of the last row out, the keys and values kept in between."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.registry import Registry


class DecoderState(Protocol):
    """One conversation's rows in the decoder."""

    @property
    def length(self) -> int:
        """How many rows the cache holds."""
        ...

    def append(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Put rows after those in the cache.

        Args:
            embeds: float32 [n, H], n of 1 or more.
            positions: int64 [n]; gaps are allowed.

        Returns:
            float32 [V], the logits after the last row.

        Raises:
            NumericalError: NaN or infinity in the logits.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget every row from ``length`` on."""
        ...


class Decoder(Protocol):
    """Makes states that share one set of weights."""

    name: str

    def start(self) -> DecoderState:
        """A state without rows."""
        ...


BACKENDS = Registry(
    "decoder backend",
    {
        "onnxruntime": "svdprune.runtime.decoder.onnxruntime:open_decoder",
        "transformers": "svdprune.runtime.decoder.transformers:open_decoder",
    },
)


def open_decoder(name: str, bundle: Bundle, threads: int | None = None, checkpoint: str | None = None) -> Decoder:
    """Open the decoder with the backend ``name``.

    Args:
        bundle: an opened bundle.
        threads: CPU threads, None for all.
        checkpoint: the folder (or hub id) of the weights; ``transformers`` needs it, the others refuse it.

    Raises:
        UserError: unknown backend, not available here, or ``checkpoint`` given or missing against the above.
        BundleError: the graph cannot be used.
    """
    opener = BACKENDS.find(name)
    if name == "transformers":
        if checkpoint is None:
            raise UserError(
                "the transformers decoder reads the original weights, which a bundle does not hold: "
                "give checkpoint=, the folder or hub id it was exported from"
            )
        decoder: Decoder = opener(bundle, threads, checkpoint)
        return decoder
    if checkpoint is not None:
        raise UserError(f"the decoder {name} runs from the bundle alone: leave out checkpoint=")
    decoder = opener(bundle, threads)
    return decoder


def check_rows(embeds: np.ndarray, positions: np.ndarray, hidden: int) -> None:
    """Refuse rows that do not fit together: a caller's bug, so a ``ValueError``."""
    if embeds.ndim != 2 or embeds.shape[0] < 1 or embeds.shape[1] != hidden or positions.shape != embeds.shape[:1]:
        raise ValueError(f"rows {embeds.shape} and positions {positions.shape} do not fit a hidden size of {hidden}")


def check_logits(logits: np.ndarray) -> np.ndarray:
    """The logits [V], when all are finite.

    Raises:
        NumericalError: NaN or infinity.
    """
    if not np.isfinite(logits).all():
        raise NumericalError(
            "the decoder gave NaN or infinite logits: no token was chosen; export with a higher precision"
        )
    return logits
