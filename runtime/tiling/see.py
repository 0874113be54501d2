"""A picture that is cut into tiles, from its file to the rows of the prompt."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from svdprune.runtime.answer import Sight
from svdprune.runtime.errors import BundleError
from svdprune.runtime.preprocess import normalise, open_image
from svdprune.runtime.tiling import TilesInfo, tiling_of
from svdprune.runtime.tiling.pictured import sight_of
from svdprune.runtime.tiling.slots import chosen, lay_out

if TYPE_CHECKING:
    from svdprune.runtime.bundle import Bundle
    from svdprune.runtime.preprocess import ImageSource
    from svdprune.runtime.vlm import Vlm


def see_tiles(vlm: Vlm, image: ImageSource, tiles: TilesInfo) -> Sight:
    """``Vlm.see`` for a bundle with tiles. The rows are put together on the host, whatever the backend."""
    info, settings = vlm.manifest.vision, vlm.settings
    assert settings.tiling is not None  # the bundle was checked when it was opened
    started = time.perf_counter()
    cut = tiling_of(settings.tiling, vlm.manifest.processor.image).cut(open_image(image), settings.resample)
    slots = lay_out(cut, tiles, info.tokens)
    feed = cut.pixels if info.input == "uint8" else normalise(cut.pixels, settings)
    prepared = time.perf_counter()
    output = vlm.vision.encode(feed, slots=slots)
    found = chosen(slots, output.features, output.kept_indices, output.scores, len(cut.places), output.deepstack)
    sight = sight_of(cut, found, vlm.embed, vlm.marks)
    seconds = time.perf_counter() - prepared
    return dataclasses.replace(sight, preprocess=prepared - started, vision=seconds)


def read_marks(bundle: Bundle) -> np.ndarray | None:
    """The rows float32 [E, H] that ``vision.tiles.marks`` names, None where it names none.

    Raises:
        BundleError: not such an array.
    """
    manifest = bundle.manifest
    if manifest.vision.tiles is None or manifest.vision.tiles.marks is None:
        return None
    path = bundle.file(manifest.vision.tiles.marks)
    try:
        marks = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error
    hidden = manifest.decoder.hidden
    if not isinstance(marks, np.ndarray) or marks.dtype != np.float32 or marks.ndim != 2 or marks.shape[1] != hidden:
        raise BundleError(f"{path} does not hold float32 rows of {hidden}: export the bundle again")
    return marks
