"""The vision graph as an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from typing import Any

import numpy as np

from svdprune.runtime.arrays import passed
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.engines.device import Device
from svdprune.runtime.engines.installation import Installation
from svdprune.runtime.engines.open import check_tensors, open_engine
from svdprune.runtime.engines.session import EngineSession
from svdprune.runtime.errors import UserError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.tiling.slots import Slots
from svdprune.runtime.vision import VisionOutput, check_output, choices, feed_of, input_types, output_types


def open_tensorrt(
    bundle: Bundle, threads: int | None = None, device: Device | None = None, verify: bool = True
) -> EngineVision:
    """The backend ``tensorrt``: full TensorRT 10 or 11. CPU ``threads`` do not matter to it."""
    return _open("tensorrt", bundle, device, verify)


def open_tensorrt_rtx(
    bundle: Bundle, threads: int | None = None, device: Device | None = None, verify: bool = True
) -> EngineVision:
    """The backend ``tensorrt_rtx``. CPU ``threads`` do not matter to it."""
    return _open("tensorrt_rtx", bundle, device, verify)


def _open(name: str, bundle: Bundle, device: Device | None, verify: bool) -> EngineVision:
    with open_engine(bundle, "vision", name, device, verify) as engine:
        return EngineVision(
            engine.trt,
            engine.data,
            engine.device,
            bundle.manifest.vision,
            engine.where,
            engine.host_code,
            device is None,
        )


class EngineVision:
    """A ``VisionBackend`` over an engine; a CUDA graph is kept for each of the first few batch sizes that are used.

    Args:
        trt: the library that built the engine.
        data: the serialised engine.
        device: where it runs.
        info: the manifest's ``vision``.
        where: what to call the engine in messages.
        host_code: it may hold code for the CPU.
        owns_device: close the device, too, in the end.

    Raises:
        BundleError: the engine's inputs or outputs are not the contract's.
        EngineFault, UserError: see ``EngineSession``.
    """

    def __init__(
        self,
        trt: Installation,
        data: Any,
        device: Device,
        info: VisionInfo,
        where: str,
        host_code: bool = False,
        owns_device: bool = False,
    ) -> None:
        self.name, self.device = trt.name, device
        self._info, self._owns_device = info, owns_device
        self.session = EngineSession(trt, data, device, where, host_code=host_code)
        try:
            check_tensors(self.session, {**input_types(info), **output_types(info)})
        except BaseException:
            self.session.close()
            raise

    @property
    def most(self) -> int:
        """How many pictures, or tiles of one, the engine encodes at once, at most."""
        return self.session.largest["pixels"][0]

    def encode(self, pixels: np.ndarray, on_device: bool = False, slots: Slots | None = None) -> VisionOutput:
        """See ``VisionBackend.encode``.

        Raises:
            UserError: also for more pictures than the engine was built for.
        """
        feed = feed_of(pixels, slots, self._info)
        if not 1 <= len(pixels) <= self.most:
            raise UserError(
                f"{self.session.where} encodes up to {self.most} pictures at once, not {len(pixels)}: give fewer, or "
                "build it for a larger --batch"
            )
        left = ("features",) if on_device else ()
        outputs = self.session.run(feed, on_device=left, repeats=True)
        made = VisionOutput(*(passed(outputs[name]) for name in output_types(self._info)))
        return check_output(made, choices(pixels, slots), self._info, self.session.where)

    def close(self) -> None:
        """See ``VisionBackend.close``."""
        self.session.close()
        if self._owns_device:
            self.device.close()
