"""The inputs of a vision graph for one picture, in tiles or not, and the rows that its outputs make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svdprune.runtime.preprocess import ImageSettings, normalise, open_image, preprocess
from svdprune.runtime.prompt import Pictured
from svdprune.runtime.tiling import Cut, tiling_of
from svdprune.runtime.tiling.pictured import pictured
from svdprune.runtime.tiling.slots import Slots, chosen, lay_out

if TYPE_CHECKING:
    from svdprune.runtime.manifest import Manifest
    from svdprune.runtime.preprocess import ImageSource
    from svdprune.runtime.vlm import Vlm


@dataclass(frozen=True)
class Prepared:
    """A picture ready for the vision graph: its ``inputs`` by name, and for tiles what their outputs will mean."""

    inputs: dict[str, np.ndarray]
    cut: Cut | None = None
    slots: Slots | None = None


def prepare(image: ImageSource, settings: ImageSettings, manifest: Manifest) -> Prepared:
    """``pixels``, and for tiles ``sources``, ``weights`` and what else the graph takes.

    Raises:
        UserError: the picture cannot be used.
    """
    info, picture = manifest.vision, open_image(image)
    if info.tiles is None or settings.tiling is None:
        pixels = preprocess(picture, settings)
        return Prepared({"pixels": (pixels if info.input == "uint8" else normalise(pixels, settings))[None]})
    cut = tiling_of(settings.tiling, manifest.processor.image).cut(picture, settings.resample)
    slots = lay_out(cut, info.tiles, info.tokens)
    pixels = cut.pixels if info.input == "uint8" else normalise(cut.pixels, settings)
    return Prepared({"pixels": pixels, "sources": slots.sources, "weights": slots.weights, **cut.extras}, cut, slots)


def rows_of(prepared: Prepared, outputs: Mapping[str, np.ndarray], vlm: Vlm) -> Pictured | None:
    """Rows of a picture in tiles, as ``Vlm.see`` makes them; None for a picture that is not.

    Args:
        outputs: ``features`` [G, K, H], ``kept_indices`` [G, K] unless nothing was dropped, and ``deepstack``
            [G, L, K, H] where the graph gives it.
    """
    if prepared.cut is None or prepared.slots is None:
        return None
    groups, slots = prepared.slots.sources.shape[:2]
    kept = outputs.get("kept_indices", np.tile(np.arange(slots), (groups, 1)))
    scores = outputs.get("scores", np.zeros((groups, slots), np.float32))
    found = chosen(
        prepared.slots,
        np.asarray(outputs["features"]),
        kept,
        scores,
        len(prepared.cut.places),
        None if "deepstack" not in outputs else np.asarray(outputs["deepstack"]),
    )
    return pictured(prepared.cut, found, vlm.embed, vlm.marks)


def slots_of(feed: Mapping[str, np.ndarray]) -> Slots | None:
    """The slots in a graph's inputs, to hand to a backend: which candidate is where, it does not ask."""
    if "sources" not in feed:
        return None
    sources = feed["sources"]
    extras = {name: value for name, value in feed.items() if name not in ("pixels", "sources", "weights")}
    return Slots(sources, feed["weights"], np.zeros(sources.shape[:2], np.int64), extras)
