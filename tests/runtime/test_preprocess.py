"""Pictures: the same pixels as transformers', and a sentence for each picture that cannot be used."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from svdprune.runtime.errors import BundleError, UserError
from svdprune.runtime.preprocess import (
    MAX_PIXELS,
    ImageSettings,
    PictureWarning,
    normalise,
    open_image,
    preprocess,
)

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def settings(**changes: Any) -> ImageSettings:
    """CLIP's at 56 pixels."""
    content = {
        "resize": {"shortest_edge": 56},
        "resample": 3,
        "crop": {"height": 56, "width": 56},
        "rescale": 1 / 255,
        "mean": MEAN,
        "std": STD,
        "convert_rgb": True,
    }
    return ImageSettings.from_json(content | changes)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with sharp noise on top, uint8."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), 3)
    fine = random.integers(-30, 30, (height, width, 3))
    rgb = np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)
    alpha = random.integers(0, 256, (height, width, 1), np.uint8)
    return np.concatenate([rgb, alpha], axis=2)[:, :, :channels]


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def pictures(folder: Path) -> dict[str, Path]:
    """One file of each kind that preprocessing must get right."""
    made: dict[str, Path] = {}

    def save(name: str, image: Image.Image, suffix: str = "png", **options: Any) -> None:
        made[name] = folder / f"{name}.{suffix}"
        image.save(made[name], **options)

    for name, size in {"odd": (101, 67), "portrait": (61, 140), "landscape": (333, 90), "small": (9, 7)}.items():
        save(name, Image.fromarray(noise(size[1], size[0])))
    save("exact", Image.fromarray(noise(56, 56)))
    save("one-pixel", Image.fromarray(noise(1, 1)))
    save("thin", Image.fromarray(noise(300, 2)))
    rgb = Image.fromarray(noise(70, 85))
    save("palette", rgb.quantize(32))
    palette = rgb.quantize(32)
    save("palette-transparent", palette, transparency=3)
    save("alpha", Image.fromarray(noise(70, 85, 4)))
    save("grey", rgb.convert("L"))
    save("grey-alpha", Image.fromarray(noise(70, 85, 4)).convert("LA"))
    save("one-bit", rgb.convert("1"))
    save("grey-16-bit", Image.fromarray(noise(70, 85)[..., 0].astype(np.uint16) * 257))
    save("cmyk", rgb.convert("CMYK"), "jpg")
    save("jpeg", rgb, "jpg", quality=80)
    save("webp", rgb, "webp", lossless=True)
    save("bmp", rgb, "bmp")
    save("float-tiff", Image.fromarray(noise(70, 85)[..., 0].astype(np.float32)), "tiff")
    for orientation in range(1, 9):
        save(f"exif-{orientation}", rgb, "jpg", quality=95, exif=_exif(orientation))
    return made


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "crop-larger": {"resize": {"shortest_edge": 40}},
    "crop-odd": {"crop": {"height": 51, "width": 45}},
    "fixed-bilinear": {"resize": {"height": 50, "width": 30}, "resample": 2, "crop": None},
    "crop-only": {"resize": None},
    "identity": {"resize": None, "crop": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    reason = "the reference processor is not installed here"
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason=reason)
    image_utils = pytest.importorskip("transformers.image_utils", reason=reason)
    ours = settings(**VARIANTS[variant])
    reference = clip.CLIPImageProcessorPil(
        do_resize=ours.resize is not None,
        size=ours.resize or {"shortest_edge": 56},
        resample=ours.resample,
        do_center_crop=ours.crop is not None,
        crop_size=ours.crop or {"height": 56, "width": 56},
        image_mean=MEAN,
        image_std=STD,
    )
    for name, path in pictures(tmp_path).items():
        wanted = reference(image_utils.load_image(str(path)), do_rescale=False, do_normalize=False)["pixel_values"][0]
        pixels = preprocess(open_image(path), ours)
        assert pixels.dtype == np.uint8
        difference = np.abs(pixels.astype(int) - np.asarray(wanted).transpose(1, 2, 0))
        assert difference.max() == 0, name  # the issue allows one step; Pillow does the same work in both
        values = reference(image_utils.load_image(str(path)))["pixel_values"][0]
        np.testing.assert_allclose(normalise(pixels, ours), values, atol=1e-5, err_msg=name)


def test_a_path_bytes_an_image_and_an_array_are_one(tmp_path: Path) -> None:
    array = noise(67, 101)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    wanted = preprocess(open_image(path), settings())
    for source in (str(path), path.read_bytes(), Image.open(path), array):
        assert (preprocess(open_image(source), settings()) == wanted).all()
    assert (np.asarray(open_image(array[..., 0]))[..., 2] == array[..., 0]).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.fromarray(noise(40, 80)).save(path, exif=_exif(6))
    assert open_image(path).size == (40, 80)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _vast_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes of data do not hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_000, 9_000), (10_000, 9_300), (100_000, 1_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_vast_picture_is_refused_from_its_header(size: tuple[int, int], tmp_path: Path) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    path = tmp_path / "vast.png"
    path.write_bytes(_vast_png(*size))
    with pytest.raises(UserError, match="more than the 80 megapixels allowed: make it smaller first"):
        open_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warning as an error must come out as the same sentence
        with pytest.raises(UserError, match="more than the 80 megapixels"):
            open_image(path)


def test_a_long_thin_picture_is_refused_before_it_is_blown_up() -> None:
    image = open_image(np.zeros((1, 50_000, 3), np.uint8))
    with pytest.raises(UserError, match=r"50,000 x 1, too long and thin: .*2,800,000 x 56 pixels; crop it"):
        preprocess(image, settings())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff"])
def test_a_truncated_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise(120, 150)).save(path)
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"damaged or cut short|not a picture"):
            open_image(path)


def test_a_damaged_picture_is_one_sentence_or_a_picture(tmp_path: Path) -> None:
    """Random damage anywhere: either Pillow can still read it or the error is ours."""
    random = np.random.default_rng(0)
    refused = 0
    for suffix in ("jpeg", "png", "gif", "webp", "tiff", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(noise(40, 50)).save(buffer, suffix)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(6):
                content[random.integers(0, min(len(content), 400))] = random.integers(0, 256)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert open_image(bytes(content)).mode == "RGB"
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 20


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    cases: dict[Any, str] = {
        tmp_path / "absent.png": "there is no picture at",
        tmp_path: "is a folder",
        "https://example.org/cat.jpg": "is an address: download",
        "/dev/null": "is not a regular file",
        "a\0b": "cannot be read",
        3: "must be a path, bytes, a Pillow image or a uint8 array, not int",
        None: "not NoneType",
    }
    for source, words in cases.items():
        with pytest.raises(UserError, match=words):
            open_image(source)
    for name, content, words in (
        ("empty.jpg", b"", "is empty"),
        ("text.jpg", b"not a picture at all", "is not a picture that Pillow can read"),
        ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            open_image(tmp_path / name)
        with pytest.raises(UserError):
            open_image(content)


def test_arrays_of_another_kind() -> None:
    for array, words in (
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]: give uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"uint8 \[2, 4, 4, 3\]"),
        (np.zeros(4, np.uint8), r"uint8 \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
    ):
        with pytest.raises(UserError, match=words):
            open_image(array)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame_and_says_so(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    with pytest.warns(PictureWarning, match="several frames, the first is used"):
        image = open_image(path)
    red, green, blue = np.asarray(image)[15, 20]
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resize": {"longest_edge": 9}}, "it must have shortest_edge, or height and width"),
        ({"resize": {"shortest_edge": 0}}, "sizes must be 1 or more"),
        ({"crop": {"height": 3}}, "crop has .*it must have height and width"),
        ({"resample": 9}, "Pillow's filters are 0 to 5"),
        ({"mean": [0.5]}, "mean and std must have 3 values"),
        ({"std": [1.0, 0.0, 1.0]}, "without zeros"),
        ({"rescale": "1/255"}, "image.json: rescale must be a number, not a string"),
        ({"do_pad": True}, "do_pad is not known"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        settings(**change)
