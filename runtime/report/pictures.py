"""Pictures for the page: seen by a bundle, drawn as two panels, packed so that the page stays small."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from svdprune.runtime.answer import Sight
from svdprune.runtime.arrays import passed
from svdprune.runtime.bundle import Bundle
from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.manifest import VisionInfo
from svdprune.runtime.picture import kept_panels
from svdprune.runtime.preprocess import ImageSettings, normalise, open_image, preprocess
from svdprune.runtime.report import REPORT
from svdprune.runtime.report.facts import Facts, ShownPanel, ShownPicture
from svdprune.runtime.tiling import View, tiling_of
from svdprune.runtime.verify_golden import read_golden
from svdprune.runtime.vision import VisionBackend

if TYPE_CHECKING:
    from svdprune.runtime.preprocess import ImageSource

WIDTH = 840  # pixels of a panel, at most
LARGE = 500_000  # bytes of a PNG from which a JPEG is taken instead
PNG, JPEG = "image/png", "image/jpeg"
SUFFIXES = {PNG: ".png", JPEG: ".jpg"}
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Packed:
    """A picture file in memory."""

    data: bytes
    media: str
    width: int
    height: int


@dataclass(frozen=True)
class Panel:
    """The picture, or a view of one in tiles: with what was kept, and its scores from ``low`` to ``high``."""

    photo: Packed
    scores: Packed
    kept: int
    tokens: int
    low: float
    high: float


@dataclass(frozen=True)
class Shown:
    """A picture on the page, and what was asked about it. ``answered_by`` says whose answer it is.

    ``panels``: one; for a picture in tiles one of each view.
    """

    name: str
    panels: Sequence[Panel]
    question: str | None = None
    answer: str | None = None
    answered_by: str = ""

    @property
    def kept(self) -> int:
        """Of all panels."""
        return sum(panel.kept for panel in self.panels)

    @property
    def tokens(self) -> int:
        """Of all panels."""
        return sum(panel.tokens for panel in self.panels)


def image_settings(bundle: Bundle) -> ImageSettings:
    """How the bundle preprocesses pictures."""
    name = bundle.manifest.processor.image
    return ImageSettings.from_json(bundle.read_json(name), name)


def look(vision: VisionBackend, bundle: Bundle, settings: ImageSettings, image: ImageSource) -> Sight:
    """What ``Vlm.see`` does with a picture that is not cut into tiles, for a page that needs no decoder.

    Raises:
        UserError: the picture cannot be used.
        NumericalError: NaN or infinity in the features or scores.
    """
    pixels = preprocess(open_image(image), settings)
    feed = pixels if bundle.manifest.vision.input == "uint8" else normalise(pixels, settings)
    output = vision.encode(feed[None])
    return Sight(passed(output.features_in_place[0]), output.kept_indices[0], output.scores[0], pixels)


def shown(
    name: str,
    sight: Sight,
    info: VisionInfo,
    question: str | None = None,
    answer: str | None = None,
    answered_by: str = "",
) -> Shown:
    """A picture that was seen, drawn."""
    views = [View(sight.pixels, (info.grid[0], info.grid[1]), 0)] if sight.tiled is None else sight.tiled.views
    panels = _panels(views, sight.scores, sight.kept_indices)
    return Shown(name, panels, question, answer, answered_by)


def golden_picture(bundle: Bundle) -> Shown:
    """The golden case, from its files: nothing is run.

    Raises:
        BundleError: a file of it cannot be read.
    """
    golden, settings, info = read_golden(bundle), image_settings(bundle), bundle.manifest.vision
    picture = open_image(golden.picture)
    if settings.tiling is None:
        views = [View(preprocess(picture, settings), (info.grid[0], info.grid[1]), 0)]
    else:
        views = tiling_of(settings.tiling, bundle.manifest.processor.image).cut(picture, settings.resample).views
    panels = _panels(views, golden.scores, golden.kept)
    by = f"by the checkpoint itself at export ({golden.reference})"
    return Shown("golden picture", panels, golden.question, golden.answer, by)


def stored_pictures(bundle: Bundle, facts: Facts) -> list[Shown]:
    """The pictures that the export drew.

    Raises:
        BundleError: a file of them is not a picture.
    """
    found = []
    for one in facts.pictures:
        panels = [
            Panel(
                _stored(bundle, panel.photo), _stored(bundle, panel.scores),
                panel.kept, panel.tokens, panel.low, panel.high,
            )
            for panel in one.panels
        ]  # fmt: skip
        by = "by this bundle, at export" if one.answer is not None else ""
        found.append(Shown(one.name, panels, one.question, one.answer, by))
    return found


def store_pictures(folder: Path, pictures: Sequence[Shown]) -> list[ShownPicture]:
    """Write the panels into a bundle that is being made; what ``stored_pictures`` reads back."""
    found = []
    for number, one in enumerate(pictures, 1):
        panels = []
        for view, panel in enumerate(one.panels, 1):
            names = []
            for kind, packed in (("kept", panel.photo), ("scores", panel.scores)):
                names.append(f"{REPORT}/picture-{number}-{view}-{kind}{SUFFIXES[packed.media]}")
                place = folder / names[-1]
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(packed.data)
            panels.append(ShownPanel(names[0], names[1], panel.kept, panel.tokens, panel.low, panel.high))
        found.append(ShownPicture(one.name, panels, one.question, one.answer))
    return found


def picture_files(places: Sequence[Path], limit: int) -> list[Path]:
    """Files, and of folders the pictures in them by name, ``limit`` in all.

    Raises:
        UserError: nothing there, or a folder without pictures.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            found.append(place)
            continue
        held = sorted(file for file in place.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file())
        if not held:
            raise UserError(f"{place} holds no pictures ({', '.join(PICTURE_SUFFIXES)}): give files, or another folder")
        found += held
    return found[:limit]


def _panels(views: Sequence[View], scores: np.ndarray, kept: np.ndarray) -> list[Panel]:
    """A panel of each view."""
    panels = []
    for view in views:
        own, inside = view.part(scores, kept)
        drawn = kept_panels(view.pixels, own, inside, view.grid)
        panels.append(Panel(pack(drawn.photo), pack(drawn.scores), drawn.kept, len(own), drawn.low, drawn.high))
    return panels


def pack(picture: Image.Image) -> Packed:
    """As PNG; a photograph that would be large is made a JPEG."""
    if picture.width > WIDTH:
        size = (WIDTH, max(1, round(picture.height * WIDTH / picture.width)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    media = PNG
    if out.tell() > LARGE:
        out, media = io.BytesIO(), JPEG
        picture.save(out, "JPEG", quality=88, subsampling=0)
    return Packed(out.getvalue(), media, picture.width, picture.height)


def _stored(bundle: Bundle, name: str) -> Packed:
    place = bundle.file(name)
    try:
        data = place.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            media = {"PNG": PNG, "JPEG": JPEG}.get(picture.format or "")
            if media is None:
                raise BundleError(f"{place} is neither PNG nor JPEG: export the bundle again")
            return Packed(data, media, picture.width, picture.height)
    except OSError as error:
        raise BundleError(f"{place} cannot be read as a picture ({error}): export the bundle again") from error
