"""Frames of a video without a video decoder: an animated picture, or a folder of frame pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svdprune.runtime.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_CONTAINERS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def read_video(source: str | Path, frames: int) -> list[Image.Image]:
    """So many frames, evenly spaced over the whole: upright RGB pictures, in order.

    Args:
        source: an animated GIF, WebP, PNG or TIFF, or a folder of pictures in the order of their names (numbers in
            names count as numbers).
        frames: how many; all of them where there are fewer.

    Raises:
        UserError: not such a file or folder, nothing in it, a frame that cannot be read, or ``frames`` below 1.
    """
    if frames < 1:
        raise UserError(f"{frames} frames of a video cannot be: give 1 or more")
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, frames)
    if path.suffix.lower() in _CONTAINERS:
        raise UserError(
            f"{path} needs a video decoder, which svdprune does not have: write its frames into a folder first, for "
            f"example with `ffmpeg -i {path.name} frames/%05d.png`, and give the folder"
        )
    return _of_animation(path, frames)


def sampled(items: Sequence[T], count: int) -> list[T]:
    """``count`` of the items, evenly spaced from the first on, or all where there are no more.

    As transformers' ``default_sample_indices_fn``.
    """
    if count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def _of_folder(folder: Path, frames: int) -> list[Image.Image]:
    from svdprune.runtime.preprocess import open_image

    files = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _SUFFIXES]
    if not files:
        raise UserError(f"{folder} holds no pictures: give a folder of frames ({', '.join(_SUFFIXES)})")
    return [open_image(file) for file in sampled(sorted(files, key=_by_name), frames)]


def _by_name(file: Path) -> list[tuple[int, int, str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", file.name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]


def _of_animation(path: Path, frames: int) -> list[Image.Image]:
    from svdprune.runtime.preprocess import animation

    with animation(path) as picture:
        count = int(getattr(picture, "n_frames", 1))
        if count < 2:
            raise UserError(f"{path} has one frame: give it with --image, or an animation or a folder of frames here")
        return [_frame(picture, number, path) for number in sampled(range(count), frames)]


def _frame(picture: Any, number: int, path: Path) -> Image.Image:
    from svdprune.runtime.preprocess import DECODER_ERRORS, open_image

    try:
        picture.seek(number)
        frame = picture.convert("RGB")
    except DECODER_ERRORS as error:
        raise UserError(f"frame {number} of {path} is damaged ({error}): get the file again") from error
    return open_image(frame)
