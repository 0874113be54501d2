"""The vision graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.ort import CPU, CUDA, check_names, open_session, ort_errors
from svdprune.runtime.vision import VisionOutput, check_finite

_OUTPUTS = ["features", "kept_indices", "scores"]


def open_cpu(path: Path, info: VisionInfo, threads: int | None = None) -> OnnxVision:
    """The backend ``onnxruntime``: on the CPU."""
    return OnnxVision("onnxruntime", open_session(path, threads, CPU), path, info)


def open_cuda(path: Path, info: VisionInfo, threads: int | None = None) -> OnnxVision:
    """The backend ``onnxruntime-cuda``: on an NVIDIA GPU, refused where onnxruntime cannot use one."""
    return OnnxVision("onnxruntime-cuda", open_session(path, threads, CUDA), path, info)


class OnnxVision:
    """A ``VisionBackend`` over an ``onnxruntime.InferenceSession``."""

    def __init__(self, name: str, session: Any, path: Path, info: VisionInfo) -> None:
        self.name = name
        self._session, self._path, self._info = session, path, info
        check_names(path, "input", ["pixels"], [item.name for item in session.get_inputs()])
        check_names(path, "output", _OUTPUTS, [item.name for item in session.get_outputs()])
        wanted = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[info.input]
        found = session.get_inputs()[0].type
        if found != wanted:
            raise BundleError(f"{path} takes {found} pixels, the manifest says {info.input}: export the bundle again")

    def encode(self, pixels: np.ndarray) -> VisionOutput:
        """See ``VisionBackend.encode``."""
        info = self._info
        size = (info.height, info.width)
        shape = (*size, 3) if info.input == "uint8" else (3, *size)
        if pixels.dtype != info.input or pixels.ndim != 4 or pixels.shape[1:] != shape:
            raise UserError(
                f"the vision graph takes {info.input} pixels [B, {', '.join(map(str, shape))}], "
                f"not {pixels.dtype} {list(pixels.shape)}"
            )
        try:
            features, kept, scores = self._session.run(_OUTPUTS, {"pixels": pixels})
        except ort_errors() as error:
            raise BundleError(f"{self._path} failed to run ({error}): export the bundle again") from error
        self._check(len(pixels), features, kept, scores)
        return VisionOutput(features, kept, scores)

    def _check(self, batch: int, features: np.ndarray, kept: np.ndarray, scores: np.ndarray) -> None:
        """The graph's contract, on what came out."""
        info = self._info
        for name, array, dtype, shape in (
            ("features", features, np.float32, (batch, info.keep, info.hidden)),
            ("kept_indices", kept, np.int64, (batch, info.keep)),
            ("scores", scores, np.float32, (batch, info.tokens)),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise BundleError(
                    f"{self._path} gave {name} {array.dtype} {list(array.shape)}, the manifest says "
                    f"{np.dtype(dtype).name} {list(shape)}: export the bundle again"
                )
        check_finite("scores", scores)
        check_finite("features", features)
        if kept.min() < 0 or kept.max() >= info.tokens or (np.diff(kept, axis=1) <= 0).any():
            raise BundleError(f"{self._path} gave kept_indices out of order or range: export the bundle again")
