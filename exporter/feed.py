"""The vision graph of an export before there is a bundle to ask: its inputs, and its selector in torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

from svdprune.exporter.families import VisionSpec
from svdprune.exporter.selection import Selector, SelectorConfig, build_selector
from svdprune.runtime.preprocess import ImageSettings, normalise, preprocess
from svdprune.runtime.tiling import tiling_of
from svdprune.runtime.tiling.feed import Prepared
from svdprune.runtime.tiling.slots import lay_out


def feed_of(image: Image.Image, images: ImageSettings, spec: VisionSpec, raw: bool) -> Prepared:
    """The graph's inputs by name, batch axis included, and for tiles what its outputs will mean.

    Args:
        images: with the family's tiling. raw: whether the graph takes bytes or normalised floats.

    Raises:
        UserError: a picture that cannot be cut into tiles.
    """
    tiles = spec.tiles()
    if tiles is None or images.tiling is None:
        pixels = preprocess(image, images)
        return Prepared({"pixels": (pixels if raw else normalise(pixels, images))[None]})
    cut = tiling_of(images.tiling).cut(image.convert("RGB"), images.resample)
    slots = lay_out(cut, tiles, spec.tokens)
    pixels = cut.pixels if raw else normalise(cut.pixels, images)
    return Prepared({"pixels": pixels, "sources": slots.sources, "weights": slots.weights, **cut.extras}, cut, slots)


def selector_for(
    spec: VisionSpec, config: SelectorConfig, keep: int, channels: int | None = None, start: np.ndarray | None = None
) -> Selector:
    """The selector in torch, with the settings that the graph of this spec has; `channels`: of other features than its.

    Raises:
        UserError: a selector that needs pictures of a fixed number of tokens, for a family where that varies.
    """
    return build_selector(
        config,
        spec.tokens,
        channels or spec.channels,
        grid=spec.selection_grid,
        keep=keep,
        start=start,
        padded=spec.tiling is not None,
    )
