"""Pictures that are cut into tiles, from their files to the rows of the prompt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from svdprune.runtime.answer import Sight
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.preprocess import normalise, open_image
from svdprune.runtime.tiling import SEVERAL, Cut, TilesInfo, tiling_of, video_tiling_of
from svdprune.runtime.tiling.pictured import sight_of
from svdprune.runtime.tiling.slots import Chosen, chosen, lay_out

if TYPE_CHECKING:
    from svdprune.runtime.bundle import Bundle
    from svdprune.runtime.preprocess import ImageSource
    from svdprune.runtime.vlm import Vlm


def see_tiles(vlm: Vlm, images: Sequence[ImageSource], tiles: TilesInfo, pictures: int = 1) -> list[Sight]:
    """``Vlm.see`` for a bundle with tiles. The rows are put together on the host, whatever the backend.

    Args:
        images: seen in one run with the budget ``prompt``, which is over all of them; otherwise one after the other.
        pictures: how many the prompt holds, these included.

    Raises:
        UserError: more pictures than the budget is over; pictures that this bundle cannot take together.
    """
    settings, file = vlm.settings, vlm.manifest.processor.image
    assert settings.tiling is not None  # the bundle was checked when it was opened
    if pictures > 1 and vlm.manifest.model.family == "llava_onevision" and SEVERAL not in settings.tiling:
        raise UserError("this bundle was made for one picture a prompt: export it again")
    tiling = tiling_of(settings.tiling, file, pictures)
    if tiles.budget != "prompt":
        return [sight for image in images for sight in _seen(vlm, [image], tiling.cut, tiles)]
    if len(images) > tiles.pictures:
        raise UserError(
            f"the bundle chooses over up to {tiles.pictures} pictures of a prompt, {len(images)} were given: "
            f"give fewer, or export with --prompt-pictures {len(images)}"
        )
    return _seen(vlm, images, tiling.cut, tiles)


def see_frames(vlm: Vlm, frames: Sequence[ImageSource], tiles: TilesInfo) -> Sight | None:
    """The frames of a video as the one picture that the model makes of them; None where it has no such way.

    Raises:
        UserError: more frames than the vision graph takes.
    """
    settings = vlm.settings
    tiling = None if settings.tiling is None else video_tiling_of(settings.tiling, vlm.manifest.processor.image)
    if tiling is None:
        return None
    most = tiling.frames(tiles, vlm.manifest.vision.tokens)
    if len(frames) > most:
        raise UserError(f"the video has {len(frames)} frames, the vision graph takes {most}: give --frames {most}")
    started = time.perf_counter()
    opened = [open_image(frame) for frame in frames]
    cut = tiling.cut_frames(opened, settings.resample)
    return _encoded(vlm, [cut], tiles, started)[0]


def _seen(vlm: Vlm, images: Sequence[ImageSource], cut: Callable[..., Cut], tiles: TilesInfo) -> list[Sight]:
    started = time.perf_counter()
    return _encoded(vlm, [cut(open_image(image), vlm.settings.resample) for image in images], tiles, started)


def _encoded(vlm: Vlm, cuts: Sequence[Cut], tiles: TilesInfo, started: float) -> list[Sight]:
    """What one run of the graph makes of the cuts, whose tokens compete; the seconds count for the first."""
    info, settings = vlm.manifest.vision, vlm.settings
    whole = cuts[0] if len(cuts) == 1 else joined(cuts, tiles.per_tile)
    slots = lay_out(whole, tiles, info.tokens)
    feed = whole.pixels if info.input == "uint8" else normalise(whole.pixels, settings)
    prepared = time.perf_counter()
    output = vlm.vision.encode(feed, slots=slots)
    found = chosen(slots, output.features, output.kept_indices, output.scores, len(whole.places), output.deepstack)
    sights = [sight_of(cut, part, vlm.embed, vlm.marks) for cut, part in zip(cuts, parted(found, cuts), strict=True)]
    seconds = time.perf_counter() - prepared
    sights[0] = dataclasses.replace(sights[0], preprocess=prepared - started, vision=seconds)
    return sights


def joined(cuts: Sequence[Cut], per_tile: int) -> Cut:
    """The tiles and candidates of several cuts as those of one, one cut after the other, to be chosen from together.

    Args:
        per_tile: tokens of a tile.
    """
    wide = max(cut.sources.shape[1] for cut in cuts)
    sources, weights, owners, tiles = [], [], [], 0
    for cut in cuts:
        missing = ((0, 0), (0, wide - cut.sources.shape[1]))
        sources.append(np.pad(cut.sources + tiles * per_tile, missing))
        weights.append(np.pad(cut.weights, missing))
        owners.append(cut.tile + tiles)
        tiles += len(cut.pixels)
    count = sum(len(cut.places) for cut in cuts)
    extras = {name: np.concatenate([cut.extras[name] for cut in cuts]) for name in cuts[0].extras}
    return Cut(
        np.concatenate([cut.pixels for cut in cuts]),
        np.concatenate(sources),
        np.concatenate(weights),
        np.concatenate(owners),
        np.arange(count, dtype=np.int64),
        np.zeros((0, 3), np.int64),
        count,
        extras=extras,
    )


def parted(found: Chosen, cuts: Sequence[Cut]) -> list[Chosen]:
    """What was chosen of ``joined`` cuts, for each cut."""
    parts, first = [], 0
    for cut in cuts:
        last = first + len(cut.places)
        low, high = np.searchsorted(found.kept, [first, last])
        parts.append(
            Chosen(
                found.kept[low:high] - first,
                found.features[low:high],
                found.scores[first:last],
                None if found.deepstack is None else found.deepstack[:, low:high],
            )
        )
        first = last
    return parts


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
