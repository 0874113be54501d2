"""Pictures to pixels, as the Hugging Face image processors do it with Pillow, without transformers.

``open_image`` follows transformers' ``load_image`` (EXIF orientation applied, then ``convert("RGB")``, which drops an
alpha channel) and ``preprocess`` follows its Pillow backend (one transparent colour made white, resize, centre crop).
Normalisation lies inside the vision graph; ``normalise`` is for graphs that take float32 pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.fields import read_fields

if TYPE_CHECKING:
    from PIL import Image

    ImageSource: TypeAlias = str | Path | bytes | np.ndarray | Image.Image

MAX_PIXELS = 80_000_000
"""The most pixels of a picture, before and after resizing: 240 MB as RGB. Below Pillow's own warning at 89 million."""

_SHRINK = f"more than the {MAX_PIXELS // 1_000_000} megapixels allowed: make it smaller first, the model sees far less"
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)  # what Pillow's decoders raise


class PictureWarning(UserWarning):
    """Something about a picture that the caller may not expect, such as an animation of which one frame is used."""


@dataclass(frozen=True)
class ImageSettings:
    """``processor/image.json``.

    Attributes:
        resize: {"shortest_edge": pixels}, {"height": pixels, "width": pixels}, or None to leave the size.
        resample: Pillow's filter code (3 is bicubic).
        crop: {"height": pixels, "width": pixels} cut from the centre, padded with zeros where too small; or None.
        rescale, mean, std: what normalisation uses, (pixels * rescale - mean) / std, one value a channel.
        convert_rgb: kept for the record; the runtime always converts.
        tiling: how a picture is cut into tiles (``svdprune.runtime.tiling``); None where it stays one.
    """

    resize: dict[str, int] | None
    resample: int
    crop: dict[str, int] | None
    rescale: float
    mean: list[float]
    std: list[float]
    convert_rgb: bool = True
    tiling: dict[str, Any] | None = None

    @staticmethod
    def from_json(content: object, file: str = "image.json") -> ImageSettings:
        """Check what ``json.loads`` gave.

        Raises:
            BundleError: naming the field.
        """
        settings = read_fields(ImageSettings, content, file)
        resize, crop = settings.resize, settings.crop
        if resize is not None and set(resize) not in ({"shortest_edge"}, {"height", "width"}):
            raise BundleError(f"{file}: resize has {sorted(resize)}, it must have shortest_edge, or height and width")
        if crop is not None and set(crop) != {"height", "width"}:
            raise BundleError(f"{file}: crop has {sorted(crop)}, it must have height and width")
        for name, sizes in (("resize", resize), ("crop", crop)):
            if sizes is not None and min(sizes.values()) < 1:
                raise BundleError(f"{file}: {name} is {sizes}, sizes must be 1 or more")
        if not 0 <= settings.resample <= 5:
            raise BundleError(f"{file}: resample is {settings.resample}, Pillow's filters are 0 to 5")
        if len(settings.mean) != 3 or len(settings.std) != 3 or 0 in settings.std:
            raise BundleError(f"{file}: mean and std must have 3 values each, std without zeros")
        return settings


def open_image(source: ImageSource) -> Image.Image:
    """A picture as an upright RGB Pillow image, decoded wholly.

    Args:
        source: a path, the bytes of a picture file, a Pillow image, or an array uint8 [h, w, 3] or [h, w].

    Raises:
        UserError: missing, a folder, empty, truncated, not a picture, over ``MAX_PIXELS`` (told from the header, before
            decoding), or an array of another dtype or shape.

    An animation gives its first frame, with a ``PictureWarning``.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the picture")
    if isinstance(source, bytes):
        return _decode(_open(io.BytesIO(source), "the picture"), "the picture")
    if isinstance(source, (str, Path)):
        with _file(source) as stream:
            return _decode(_open(stream, str(source)), str(source))
    raise UserError(f"a picture must be a path, bytes, a Pillow image or a uint8 array, not {type(source).__name__}")


@contextmanager
def animation(path: str | Path) -> Iterator[Image.Image]:
    """A picture file opened, its frames to be read by ``seek``; they are not decoded yet.

    Raises:
        UserError: as of ``open_image``; frames over ``MAX_PIXELS``.
    """
    with _file(path) as stream:
        picture = _open(stream, str(path))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{path} has {width:,} x {height:,} pixels, {_SHRINK}")
        yield picture


def _decode(picture: Image.Image, name: str) -> Image.Image:
    """Check the size that the header tells, decode, turn upright, convert to RGB."""
    from PIL import ImageOps

    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width:,} x {height:,} pixels, {_SHRINK}")
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # MPO: a still with a preview attached
        warnings.warn(f"{name} has several frames, the first is used", PictureWarning, stacklevel=3)
        picture.seek(0)
    try:
        return _opaque(ImageOps.exif_transpose(picture).convert("RGB"))
    except DECODER_ERRORS as error:
        raise UserError(f"{name} is damaged or cut short ({error}): get the picture again") from error


def preprocess(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Resize and crop.

    Args:
        image: RGB, as ``open_image`` gives it.
        settings: sizes in pixels.

    Returns:
        uint8 [h, w, 3], contiguous; equal to the Hugging Face processor's pixels before rescaling.

    Raises:
        UserError: a picture so long and thin that its resized form would pass ``MAX_PIXELS``; settings that cut it into
            tiles, which ``svdprune.runtime.tiling`` does.
    """
    from PIL import Image

    if settings.tiling is not None:
        raise UserError(
            "this model cuts a picture into tiles, which this step does not do: use `svdprune run` or `verify`"
        )
    if settings.resize is not None:
        width, height = _resized(image.size, settings.resize)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"the picture is {image.size[0]:,} x {image.size[1]:,}, too long and thin: resized for the model it "
                f"would have {width:,} x {height:,} pixels; crop it first"
            )
        image = image.resize((width, height), Image.Resampling(settings.resample))
    pixels = np.asarray(image)  # [h, w, 3]
    if settings.crop is not None:
        pixels = _centre_crop(pixels, settings.crop["height"], settings.crop["width"])
    return np.ascontiguousarray(pixels)


def normalise(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [..., h, w, 3] -> float32 [..., 3, h, w], (pixels * rescale - mean) / std for each channel."""
    scaled = pixels.astype(np.float32) * np.float32(settings.rescale)
    centred = scaled - np.asarray(settings.mean, np.float32)
    return np.ascontiguousarray(np.moveaxis(centred / np.asarray(settings.std, np.float32), -1, -3))


def _file(path: str | Path) -> BinaryIO:
    """Open a regular, non-empty file."""
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise UserError(f"{path} is an address: download the picture first and give its path")
    try:
        place = Path(path)
        if place.is_dir():
            raise UserError(f"{path} is a folder: give one picture file")
        if place.exists() and not place.is_file():
            raise UserError(f"{path} is not a regular file: give one picture file")
        if place.stat().st_size == 0:
            raise UserError(f"{path} is empty: get the picture again")
        return place.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"there is no picture at {path}: check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"the picture {path!s} cannot be read ({error}): check the path and its permissions") from error


def _open(stream: BinaryIO, name: str) -> Image.Image:
    """Read the header only."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(stream)
    except UnidentifiedImageError as error:
        formats = "JPEG, PNG, WebP, BMP, GIF or TIFF"
        raise UserError(f"{name} is not a picture that Pillow can read: give a {formats} file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} has {_SHRINK}") from error
    except DECODER_ERRORS as error:
        raise UserError(f"{name} is damaged or cut short ({error}): get the picture again") from error


def _opaque(image: Image.Image) -> Image.Image:
    """White where a picture names one colour as transparent, as the processors do; Pillow keeps that colour in RGB."""
    from PIL import Image

    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(
            f"the picture is an array {array.dtype} {list(array.shape)}: "
            "give uint8 [height, width, 3] or [height, width]"
        )
    if array.size == 0:
        raise UserError(f"the picture is an array {list(array.shape)} without pixels: give at least 1 x 1")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise UserError(f"the picture has {array.shape[1]:,} x {array.shape[0]:,} pixels, {_SHRINK}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _resized(size: tuple[int, int], resize: dict[str, int]) -> tuple[int, int]:
    """(width, height) after resizing; a shortest edge keeps the aspect ratio, the long edge rounded down."""
    width, height = size
    if "shortest_edge" not in resize:
        return resize["width"], resize["height"]
    edge = resize["shortest_edge"]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut [height, width, 3] from the centre; odd leftovers fall as in transformers' ``center_crop``, zeros around."""
    rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    tall, wide = max(height, rows), max(width, columns)
    padded = np.zeros((tall, wide, 3), pixels.dtype)
    above, before = -((rows - tall) // 2), -((columns - wide) // 2)  # ceil((tall - rows) / 2)
    padded[above : above + rows, before : before + columns] = pixels
    top, left = max(0, top + above), max(0, left + before)
    return padded[top : top + height, left : left + width]
