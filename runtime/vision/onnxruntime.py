"""The vision graph on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.ort import CPU, CUDA, check_names, open_session, ort_errors
from svdprune.runtime.tiling.slots import Slots
from svdprune.runtime.vision import VisionOutput, check_output, choices, feed_of, input_types, output_types


def open_cpu(bundle: Bundle, threads: int | None = None, device: object = None, verify: bool = True) -> OnnxVision:
    """The backend ``onnxruntime``: on the CPU. ``device`` and ``verify`` are the engines'."""
    return _open("onnxruntime", bundle, threads, CPU)


def open_cuda(bundle: Bundle, threads: int | None = None, device: object = None, verify: bool = True) -> OnnxVision:
    """The backend ``onnxruntime-cuda``: on an NVIDIA GPU, refused where onnxruntime cannot use one."""
    return _open("onnxruntime-cuda", bundle, threads, CUDA)


def _open(name: str, bundle: Bundle, threads: int | None, provider: str) -> OnnxVision:
    info = bundle.manifest.vision
    path = bundle.file(info.file)
    return OnnxVision(name, open_session(path, threads, provider), path, info)


class OnnxVision:
    """A ``VisionBackend`` over an ``onnxruntime.InferenceSession``; its arrays are the host's."""

    device = None

    def __init__(self, name: str, session: Any, path: Path, info: VisionInfo) -> None:
        self.name = name
        self.session, self._path, self._info = session, path, info
        check_names(path, "input", list(input_types(info)), [item.name for item in session.get_inputs()])
        check_names(path, "output", list(output_types(info)), [item.name for item in session.get_outputs()])
        wanted = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[info.input]
        found = session.get_inputs()[0].type
        if found != wanted:
            raise BundleError(f"{path} takes {found} pixels, the manifest says {info.input}: export the bundle again")

    def encode(self, pixels: np.ndarray, on_device: bool = False, slots: Slots | None = None) -> VisionOutput:
        """See ``VisionBackend.encode``."""
        if on_device:
            raise ValueError(f"the vision backend {self.name} leaves no array on a GPU")
        feed = feed_of(pixels, slots, self._info)
        try:
            outputs = self.session.run(list(output_types(self._info)), feed)
        except ort_errors() as error:
            raise BundleError(f"{self._path} failed to run ({error}): export the bundle again") from error
        return check_output(VisionOutput(*outputs), choices(pixels, slots), self._info, self._path)

    def close(self) -> None:
        """See ``VisionBackend.close``."""
        self.session = None
