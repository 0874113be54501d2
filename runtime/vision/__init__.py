"""Vision backends: pixels to the kept tokens' features. Chosen by name, never silently replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from svdprune.runtime.arrays import AnyArray, fetched_on_read, held
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError, NumericalError, UserError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.registry import Registry

if TYPE_CHECKING:
    from svdprune.runtime.engines.device import Device
    from svdprune.runtime.tiling.slots import Slots


@fetched_on_read("features")
@dataclass(frozen=True)
class VisionOutput:
    """What the vision graph gives for B pictures, or for the B choices of one picture that is cut into tiles.

    Attributes:
        features: float32 [B, K, H], ready for the decoder; read, they are on the host.
        kept_indices: int64 [B, K], ascending, of the T patches in row-major order.
        scores: float32 [B, T], higher is kept first.
        deepstack: float32 [B, L, K, H], L levels of the kept tokens' features for the decoder's first layers; None
            where the model has none.
    """

    features: np.ndarray
    kept_indices: np.ndarray
    scores: np.ndarray
    deepstack: np.ndarray | None = None

    @property
    def features_in_place(self) -> AnyArray:
        """The features where the backend left them."""
        return held(self, "features")


class VisionBackend(Protocol):
    """Runs a vision graph.

    Attributes:
        name: of the backend.
        device: the GPU on which it can leave the features for a decoder, None where they always come to the host.
    """

    name: str
    device: Device | None

    def encode(self, pixels: np.ndarray, on_device: bool = False, slots: Slots | None = None) -> VisionOutput:
        """Encode pictures, or the tiles of one.

        Args:
            pixels: uint8 [B, height, width, 3] or float32 [B, 3, height, width], as the manifest's ``vision.input``.
            on_device: leave the features on ``device``. They are not looked at then: NaN in them shows in the logits.
            slots: of tiles, what is chosen from; for a graph of whole pictures, None.

        Raises:
            NumericalError: NaN or infinity in the features or the scores.
            BundleError: the graph does not keep its contract.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; it cannot be used after that."""
        ...


BACKENDS = Registry(
    "vision backend",
    {
        "onnxruntime": "svdprune.runtime.vision.onnxruntime:open_cpu",
        "onnxruntime-cuda": "svdprune.runtime.vision.onnxruntime:open_cuda",
        "tensorrt": "svdprune.runtime.vision.tensorrt:open_tensorrt",
        "tensorrt_rtx": "svdprune.runtime.vision.tensorrt:open_tensorrt_rtx",
    },
)


def open_vision(
    name: str, bundle: Bundle, threads: int | None = None, device: Device | None = None, verify: bool = True
) -> VisionBackend:
    """Open a bundle's vision part with the backend ``name``.

    Args:
        bundle: an opened bundle.
        threads: CPU threads, None for all; engines have no use for it.
        device: an opened GPU for an engine to share; None opens one where needed.
        verify: compare the SHA-256 of an engine's file first.

    Raises:
        UserError: unknown backend, or not available on this machine (the sentence says what to install), or no engine
            was built for it.
        BundleError: the graph or engine cannot be used.
    """
    backend: VisionBackend = BACKENDS.find(name)(bundle, threads, device, verify)
    return backend


def input_types(info: VisionInfo) -> dict[str, str]:
    """Names and number formats of the graph's inputs."""
    if info.tiles is None:
        return {"pixels": info.input}
    more = dict.fromkeys(info.tiles.extras, "float32")
    return {"pixels": info.input, **more, "sources": "int64", "weights": "float32"}


def output_types(info: VisionInfo) -> dict[str, str]:
    """Names and number formats of the graph's outputs."""
    made = {"features": "float32", "kept_indices": "int64", "scores": "float32"}
    return {**made, "deepstack": "float32"} if info.deepstack else made


def feed_of(pixels: np.ndarray, slots: Slots | None, info: VisionInfo) -> dict[str, np.ndarray]:
    """The graph's inputs, after ``check_pixels``.

    Raises:
        UserError: slots for a graph of whole pictures, none for one of tiles, or slots of another model.
    """
    check_pixels(pixels, info)
    if (slots is None) != (info.tiles is None):
        kind = "whole pictures, give no slots" if info.tiles is None else "tiles, give the slots that go with them"
        raise UserError(f"the vision graph takes {kind}")
    if slots is None or info.tiles is None:
        return {"pixels": pixels}
    found = {name: list(value.shape) for name, value in slots.extras.items()}
    wanted = {name: [len(pixels), *rest] for name, rest in info.tiles.extras.items()}
    if found != wanted:
        raise UserError(f"the vision graph takes beside pixels {wanted or 'nothing'}, the slots have {found}")
    return {"pixels": pixels, **slots.extras, "sources": slots.sources, "weights": slots.weights}


def choices(pixels: np.ndarray, slots: Slots | None) -> int:
    """How many choices the graph makes: one a picture, or as many as there are groups of slots."""
    return len(pixels) if slots is None else len(slots.sources)


def check_pixels(pixels: np.ndarray, info: VisionInfo) -> None:
    """Refuse pixels that the graph does not take.

    Raises:
        UserError: saying what it takes.
    """
    size = (info.height, info.width)
    shape = (*size, 3) if info.input == "uint8" else (3, *size)
    if pixels.dtype != info.input or pixels.ndim != 4 or pixels.shape[1:] != shape:
        raise UserError(
            f"the vision graph takes {info.input} pixels [B, {', '.join(map(str, shape))}], "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )


def check_output(output: VisionOutput, batch: int, info: VisionInfo, where: object) -> VisionOutput:
    """The graph's contract on what came out; features that are on a GPU are judged by shape and type alone.

    Args:
        output: of the graph. batch: how many choices it made.
        where: the graph's or engine's path, for the message.

    Raises:
        NumericalError, BundleError: see ``VisionBackend.encode``.
    """
    features, kept, scores = output.features_in_place, output.kept_indices, output.scores
    levels = [] if output.deepstack is None else [output.deepstack]
    deep = (batch, info.deepstack, info.keep, info.hidden)
    for name, array, dtype, shape in (
        *(("deepstack", level, np.float32, deep) for level in levels),
        ("features", features, np.float32, (batch, info.keep, info.hidden)),
        ("kept_indices", kept, np.int64, (batch, info.keep)),
        ("scores", scores, np.float32, (batch, info.tokens)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise BundleError(
                f"{where} gave {name} {array.dtype} {list(array.shape)}, the manifest says "
                f"{np.dtype(dtype).name} {list(shape)}: export the bundle again"
            )
    check_finite("scores", scores)
    if isinstance(features, np.ndarray):
        check_finite("features", features)
    if output.deepstack is not None:
        check_finite("deepstack", output.deepstack)
    if kept.min() < 0 or kept.max() >= info.tokens or (np.diff(kept, axis=1) <= 0).any():
        raise BundleError(f"{where} gave kept_indices out of order or range: export the bundle again")
    return output


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
