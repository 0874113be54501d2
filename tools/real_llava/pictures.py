"""Training pictures with what is known of every patch, and their features from the frozen tower, kept in a file.

Two kinds: the project's drawn scenes, and easy-vqa's train split. Both are drawings, so which object covers a patch,
its colour and its shape are known exactly; so are the objects that questions are asked about.
"""

from __future__ import annotations

import functools
import os
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Model

from svdprune.calib.scenes import SceneObject, draw_scene
from svdprune.calib.sources.scenes import LABEL_SHARE
from svdprune.runtime.lazy import require

IMAGE_SIZE, PATCH_SIZE = 224, 14
GRID = IMAGE_SIZE // PATCH_SIZE
FEATURE_LAYER = -4  # of twelve: here a linear read-out of colour and shape does best, see docs/quality.md
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, which the tower was trained with
STD = np.array([0.229, 0.224, 0.225], np.float32)
ON, OFF = 0.4, 0.05  # share of a patch that an object covers when it is on it, and when it is not
CANVAS = 336  # pixels of a drawn scene; questions about places count in these


@dataclass(frozen=True)
class Picture:
    """What is known of one picture.

    `owner` int8 (GRID * GRID,): 0 background, i + 1 object i, -1 on an edge. `objects` in pixels of the CANVAS.
    `asked`: (question, answer) pairs that come with the picture; none: they follow from the objects.
    """

    owner: np.ndarray
    objects: tuple[SceneObject, ...]
    asked: tuple[tuple[str, str], ...] = ()


def scene(number: int, series: str) -> tuple[Image.Image, Picture]:
    """Scene `number` of a training series; held-out scenes are drawn from other seeds."""
    drawn = draw_scene(random.Random(f"real-llava:{series}:{number}"), CANVAS, CANVAS, label_share=LABEL_SHARE)
    return drawn.image, Picture(_owner(drawn.cover, len(drawn.objects)), drawn.objects)


def easy_vqa(number: int) -> tuple[Image.Image, Picture]:
    """Picture `number` of easy-vqa's train split; the shape is what is not the colour of the first pixel."""
    paths, questions = _easy_vqa()
    asked = questions[number]
    with Image.open(paths[number]) as opened:
        image = opened.convert("RGB")
    large = np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), np.int16)
    cover = (np.abs(large - large[0, 0]).max(2) > 24).astype(np.uint8)
    rows, columns = np.nonzero(cover)
    said = {a for _, a in asked} - {"yes", "no"}
    shape = next((a for a in ("circle", "rectangle", "triangle") if a in said), "")
    color = next(iter(said - {shape}), "")
    radius = float(max(np.ptp(rows), np.ptp(columns))) / 2
    item = SceneObject(shape, color, float(columns.mean()), float(rows.mean()), radius, "")
    return image, Picture(_owner(cover, 1), (item,), asked)


@functools.cache
def _easy_vqa() -> tuple[dict[int, str], dict[int, tuple[tuple[str, str], ...]]]:
    """Paths and (question, answer) pairs of the train split, by the picture's number."""
    package = require("easy_vqa", "data", "easy-vqa")
    found: dict[int, tuple[tuple[str, str], ...]] = {}
    for text, answer, number in zip(*package.get_train_questions(), strict=True):
        found[number] = (*found.get(number, ()), (text, answer))
    return package.get_train_image_paths(), found


def _owner(cover: np.ndarray, objects: int) -> np.ndarray:
    side = CANVAS // GRID
    cells = cover.reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    shares = np.stack([(cells == i + 1).mean(1) for i in range(objects)], 1)
    owner = np.where(shares.max(1) < OFF, 0, -1)
    return np.where(shares.max(1) >= ON, shares.argmax(1) + 1, owner).astype(np.int8)


def pixels(image: Image.Image) -> torch.Tensor:
    """float32 (3, IMAGE_SIZE, IMAGE_SIZE), normalised."""
    small = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(((small / 255 - MEAN) / STD).transpose(2, 0, 1).copy())


@torch.no_grad()
def features(tower: Dinov2Model, image: Image.Image) -> torch.Tensor:
    """Hidden states of the patches at the feature layer, float32 (GRID * GRID, D); later layers are not run."""
    hidden = tower.embeddings(pixels(image)[None])
    for layer in tower.encoder.layer[: len(tower.encoder.layer) + 1 + FEATURE_LAYER]:
        hidden = layer(hidden)
    return hidden[0, 1:]


def numbered(scenes: int, easy: int, series: str) -> Iterator[tuple[Image.Image, Picture]]:
    """`scenes` scenes and `easy` pictures of easy-vqa, well mixed."""
    mixed = [("scene", i) for i in range(scenes)] + [("easy", i) for i in range(easy)]
    random.Random(series).shuffle(mixed)
    for kind, number in mixed:
        yield scene(number, series) if kind == "scene" else easy_vqa(number)


class Store:
    """Pictures and their features, float16 (N, GRID * GRID, D): computed where the file does not hold them yet."""

    def __init__(self, tower: Dinov2Model, folder: Path, scenes: int, easy: int, series: str = "train") -> None:
        width = tower.config.hidden_size
        total = scenes + easy
        path, known, count = (folder / f"{series}-{scenes}-{easy}.{s}" for s in ("f16", "pickle", "done"))
        if not known.exists():
            listed = [picture for _, picture in numbered(scenes, easy, series)]
            _replace(known, pickle.dumps(listed))
            np.memmap(path, np.float16, "w+", shape=(total, GRID * GRID, width)).flush()
        self.pictures: list[Picture] = pickle.loads(known.read_bytes())  # this program's own file
        self.features = np.memmap(path, np.float16, "r+", shape=(total, GRID * GRID, width))
        self.done = int(count.read_text()) if count.exists() else 0
        self._fill = self._filling(tower, numbered(scenes, easy, series), count)

    def more(self, wanted: int) -> int:
        """Compute features until `wanted` pictures have theirs; how many have."""
        while self.done < min(wanted, len(self.pictures)):
            next(self._fill)
        return self.done

    def _filling(self, tower: Dinov2Model, drawn: Iterator[tuple[Image.Image, Picture]], count: Path) -> Iterator[None]:
        start = self.done
        for number, (image, _) in enumerate(drawn):
            if number < start:
                continue
            self.features[number] = features(tower, image).numpy().astype(np.float16)
            self.done = number + 1
            if self.done % 25 == 0 or self.done == len(self.pictures):
                self.features.flush()
                _replace(count, str(self.done).encode())
            yield


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)
