"""Draw which vision tokens were kept: the photograph with the dropped patches dimmed, and beside it the scores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svdprune.runtime.errors import NumericalError, UserError
from svdprune.runtime.tiling import View

MIN_PATCH = 20  # pixels of the picture per patch, at least
MAX_SIDE = 4096  # pixels of one panel, at most: a very fine grid gets smaller patches

# Ten evenly spaced colours of the "inferno" colour map (by S. van der Walt and N. Smith, CC0): even steps in value are
# even steps to the eye, also in print and to the colour-blind.
_INFERNO = (0x000004, 0x1B0C41, 0x4A0C6B, 0x781C6D, 0xA52C60, 0xCF4446, 0xED6925, 0xFB9B06, 0xF7D13D, 0xFCFFA4)
_PAPER, _INK, _QUIET = (250, 250, 248), (28, 30, 34), (112, 116, 124)
_EDGE = (46, 230, 214)  # outline of a kept patch: a hue that neither photographs nor the heat map are full of
_DIM = 0.36  # brightness left to a dropped patch
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def kept_picture(
    pixels: np.ndarray,
    scores: np.ndarray,
    kept_indices: np.ndarray,
    grid: tuple[int, int],
    caption: str = "",
) -> Image.Image:
    """The two panels as one picture.

    Args:
        pixels: uint8 [h, w, 3], the picture as the model saw it (resized and cropped).
        scores: float [T], one score a patch in raster order.
        kept_indices: int [K], raster indices of the kept patches.
        grid: (rows, columns) of the patches; T = rows x columns.
        caption: a line or two of text under the panels, such as the question and the answer.

    Raises:
        UserError: shapes that do not fit together, or an index outside the grid.
        NumericalError: a score that is not finite.
    """
    panels = kept_panels(pixels, scores, kept_indices, grid)
    title = f"{panels.kept} of {grid[0] * grid[1]} vision tokens kept"
    return _sheet(panels.photo, panels.scores, title, (panels.low, panels.high), caption)


@dataclass(frozen=True)
class Panels:
    """The two panels, of the same size.

    Attributes:
        photo: the picture, dropped patches dimmed, kept ones outlined.
        scores: a colour a patch, kept ones outlined.
        low, high: the scores that the first and the last colour stand for.
        kept: how many patches were.
    """

    photo: Image.Image
    scores: Image.Image
    low: float
    high: float
    kept: int


def kept_panels(pixels: np.ndarray, scores: np.ndarray, kept_indices: np.ndarray, grid: tuple[int, int]) -> Panels:
    """The two panels, without any text; arguments and errors as of ``kept_picture``."""
    pixels, scores, kept = _checked(pixels, scores, kept_indices, grid)
    rows, columns = grid
    keep = np.isin(np.arange(rows * columns), kept).reshape(rows, columns)
    width, height = _panel_size(pixels.shape[1], pixels.shape[0], grid)
    ys, xs = _edges(height, rows), _edges(width, columns)

    photo = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), np.float32)
    left = Image.fromarray(_dimmed(photo, _spread(keep, ys, xs)))
    low, high = float(scores.min()), float(scores.max())
    heat = inferno((scores - low) / (high - low) if high > low else np.full_like(scores, 0.5))
    right = Image.fromarray(_spread(heat.reshape(rows, columns, 3), ys, xs))
    line = max(1, round(min(height / rows, width / columns) / 14))
    for panel in (left, right):
        _outline(panel, keep, ys, xs, line)
    return Panels(left, right, low, high, len(kept))


def kept_views(views: Sequence[View], scores: np.ndarray, kept_indices: np.ndarray, caption: str = "") -> Image.Image:
    """``kept_picture`` of a picture that was cut into tiles: its views below one another, the caption under the last.

    Args:
        scores: float [n], one a candidate; kept_indices: int [k] of them.
    """
    sheets = []
    for number, view in enumerate(views):
        own, inside = view.part(scores, kept_indices)
        words = caption if number == len(views) - 1 else ""
        sheets.append(kept_picture(view.pixels, own, inside, view.grid, words))
    return stacked(sheets)


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures below one another, the first on top."""
    if len(sheets) == 1:
        return sheets[0]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), _PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write ``picture`` beside ``path`` and rename, so that there is a whole file or none. The suffix sets the format.

    Raises:
        UserError: a suffix Pillow cannot write, no such folder, or a place that cannot be written.
    """
    path = Path(path)
    kind = check_picture_path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format=kind)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error
        raise


def check_picture_path(path: Path) -> str:
    """Pillow's name of the format that ``path`` asks for, so that a bad path is told before the work, not after it.

    Raises:
        UserError: a suffix Pillow cannot write, or no such folder.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UserError(f"{path} does not end in a picture's suffix: use .png or .jpg")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
    return kind


def inferno(values: np.ndarray) -> np.ndarray:
    """Colours of ``values`` in 0..1: float [...] -> uint8 [..., 3]. Values outside are clamped."""
    anchors = np.array([[color >> 16, color >> 8 & 255, color & 255] for color in _INFERNO], np.float32)
    stops = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(values, stops, anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _checked(
    pixels: np.ndarray, scores: np.ndarray, kept: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments as arrays of the wanted types, or the error that names the one that does not fit."""
    tokens = grid[0] * grid[1]
    pixels, scores, kept = np.asarray(pixels), np.asarray(scores, np.float64), np.asarray(kept)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise UserError(f"pixels must be uint8 [h, w, 3], not {pixels.dtype} {list(pixels.shape)}")
    if tokens < 1 or scores.shape != (tokens,):
        raise UserError(f"a grid of {grid[0]} x {grid[1]} needs {tokens} scores, not an array {list(scores.shape)}")
    if kept.ndim != 1 or kept.dtype.kind not in "iu" or ((kept < 0) | (kept >= tokens)).any():
        raise UserError(f"kept_indices must be whole numbers from 0 to {tokens - 1}")
    if not np.isfinite(scores).all():
        raise NumericalError("a score is NaN or infinite, so there is no order of tokens to draw")
    return pixels, scores, np.unique(kept)


def _panel_size(width: int, height: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a panel: enlarged until a patch is ``MIN_PATCH`` wide and high, within ``MAX_SIDE``."""
    scale = max(1.0, MIN_PATCH * grid[0] / height, MIN_PATCH * grid[1] / width)
    scale = float(np.ceil(scale))  # whole steps keep the patches even
    scale = min(scale, MAX_SIDE / max(width, height))
    return max(grid[1], round(width * scale)), max(grid[0], round(height * scale))


def _edges(length: int, parts: int) -> np.ndarray:
    """Pixel positions of the patch borders along one side: int [parts + 1]."""
    return np.rint(np.linspace(0, length, parts + 1)).astype(int)


def _spread(values: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """One value a patch -> one value a pixel: [rows, columns, ...] -> [height, width, ...]."""
    return np.repeat(np.repeat(values, np.diff(ys), axis=0), np.diff(xs), axis=1)


def _dimmed(photo: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Darken and half drain of colour what was dropped: float [h, w, 3] and bool [h, w] -> uint8 [h, w, 3]."""
    grey = (photo @ _LUMA)[..., None]
    dropped = _DIM * (0.5 * photo + 0.5 * grey)
    return np.rint(np.where(keep[..., None], photo, dropped)).clip(0, 255).astype(np.uint8)


def _outline(panel: Image.Image, keep: np.ndarray, ys: np.ndarray, xs: np.ndarray, line: int) -> None:
    """Frame each kept patch, in place: neighbours share a line, so that they can still be counted."""
    draw = ImageDraw.Draw(panel)
    for row, column in np.argwhere(keep):
        top, bottom, start, end = ys[row], ys[row + 1], xs[column], xs[column + 1]
        frame = (int(start), int(top), min(int(end), panel.width - 1), min(int(bottom), panel.height - 1))
        draw.rectangle(frame, outline=_EDGE, width=line)


def _sheet(left: Image.Image, right: Image.Image, title: str, limits: tuple[float, float], caption: str) -> Image.Image:
    """Lay the two panels out with titles, a legend, a colour bar and the caption."""
    unit = max(13, round(left.width / 34))  # height of the small text; everything hangs on it
    big, small = _font(round(unit * 1.35)), _font(unit)
    gap, bar = unit * 2, unit
    lines = [part for text in caption.splitlines() for part in _wrapped(text, small, 2 * left.width + gap)]
    top = gap + round(unit * 2.4)
    legend = top + left.height + round(unit * 0.9)
    size = (2 * left.width + 3 * gap, legend + round(unit * 1.2) + gap + round(len(lines) * unit * 1.5))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for panel, x, words in ((left, gap, title), (right, left.width + 2 * gap, "score of each token")):
        draw.text((x, top - round(unit * 0.9)), words, _INK, big, anchor="ls")
        sheet.paste(panel, (x, top))
    middle = legend + bar // 2
    x = gap
    for words, fill, edge in (("kept", _PAPER, _EDGE), ("dropped", (84, 84, 84), (84, 84, 84))):
        draw.rectangle((x, legend, x + bar, legend + bar), fill=fill, outline=edge, width=max(2, unit // 7))
        draw.text((x + bar + unit // 2, middle), words, _QUIET, small, anchor="lm")
        x += bar + unit // 2 + round(draw.textlength(words, small)) + unit * 2
    _color_bar(sheet, draw, (left.width + 2 * gap, legend, right.width, bar), limits, small)
    for number, words in enumerate(lines):
        draw.text((gap, legend + bar + gap + round(number * unit * 1.5)), words, _INK, small, anchor="ls")
    return sheet


def _color_bar(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    limits: tuple[float, float],
    font: Any,
) -> None:
    """The colours from the lowest to the highest score, in (x, y, width, height), with the two numbers at its ends."""
    x, y, width, height = box
    low, high = (f"{value:.3g}" for value in limits)
    pad = height // 2
    start = x + round(draw.textlength(low, font)) + pad
    end = x + width - round(draw.textlength(high, font)) - pad
    draw.text((x, y + height // 2), low, _QUIET, font, anchor="lm")
    draw.text((x + width, y + height // 2), high, _QUIET, font, anchor="rm")
    ramp = inferno(np.linspace(0.0, 1.0, max(2, end - start)))
    sheet.paste(Image.fromarray(np.repeat(ramp[None], height, axis=0)), (start, y))


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """``text`` broken at spaces into lines of at most ``width`` pixels; a longer word gets a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
