"""Vision backends: pixels to the kept tokens' features. Chosen by name, never silently replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from svdprune.runtime.errors import NumericalError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.registry import Registry


@dataclass(frozen=True)
class VisionOutput:
    """What the vision graph gives for B pictures.

    Attributes:
        features: float32 [B, K, H], ready for the decoder.
        kept_indices: int64 [B, K], ascending, of the T patches in row-major order.
        scores: float32 [B, T], higher is kept first.
    """

    features: np.ndarray
    kept_indices: np.ndarray
    scores: np.ndarray


class VisionBackend(Protocol):
    """Runs a vision graph."""

    name: str

    def encode(self, pixels: np.ndarray) -> VisionOutput:
        """Encode pictures.

        Args:
            pixels: uint8 [B, height, width, 3] or float32 [B, 3, height, width], as the manifest's ``vision.input``.

        Raises:
            NumericalError: NaN or infinity in the features or the scores.
            BundleError: the graph does not keep its contract.
        """
        ...


BACKENDS = Registry(
    "vision backend",
    {
        "onnxruntime": "svdprune.runtime.vision.onnxruntime:open_cpu",
        "onnxruntime-cuda": "svdprune.runtime.vision.onnxruntime:open_cuda",
    },
)


def open_vision(name: str, path: Path, info: VisionInfo, threads: int | None = None) -> VisionBackend:
    """Open a vision graph with the backend ``name``.

    Args:
        path: the graph's file.
        info: the manifest's ``vision``.
        threads: CPU threads, None for all.

    Raises:
        UserError: unknown backend, or not available on this machine (the sentence says what to install).
        BundleError: the graph cannot be used.
    """
    backend: VisionBackend = BACKENDS.find(name)(path, info, threads)
    return backend


def check_finite(name: str, values: np.ndarray) -> None:
    """Refuse NaN and infinity, with which the choice of tokens would be arbitrary.

    Raises:
        NumericalError: saying how many values of ``name`` are bad.
    """
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise NumericalError(
            f"the vision encoder gave {bad:,} of {values.size:,} {name} as NaN or infinity: no tokens were chosen; "
            "export with --precision fp32, and check the checkpoint's weights"
        )
