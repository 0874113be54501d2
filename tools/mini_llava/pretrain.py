"""Stage 1: teach the vision tower to say, at every patch, what object it lies on.

Joint training from scratch sits on a plateau where the language model answers from the question alone:
its gradient is too weak to shape the tower. Dense targets (shape, colour, centre, label of the object under
each patch) and global ones ([CLS]: what is present) shape it directly. The heads are thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from svdprune.calib.scenes import COLORS, SHAPES, Scene, draw_scene
from svdprune.calib.scenes.draw import DIGITS, LETTERS
from tools.mini_llava.model import GRID, PATCH_SIZE, encode

CHARACTERS = LETTERS + DIGITS
LABEL_LENGTH = 3
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_COLOR_NAMES = tuple(COLORS)
IGNORE = -100

Batch = dict[str, torch.Tensor]


def normalise(picture: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) -> float32 (3, h, w) with CLIP's mean and deviation."""
    return ((picture.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def example(seed: str, windows: tuple[int, ...], batch: int) -> dict[str, np.ndarray]:
    """One drawn window of patches at a random place of the grid, with its dense targets."""
    return example_scene(random.Random(seed), window_of(seed, windows, batch), label_share=0.85)[3]


def window_of(seed: str, windows: tuple[int, ...], batch: int) -> int:
    """Patches a side of the example `seed` ("...:number"): the `windows` in turn, one for all of a batch."""
    return windows[int(seed.rpartition(":")[2]) // batch % len(windows)]


def example_scene(rng: random.Random, window: int, label_share: float) -> tuple[Scene, int, int, dict[str, np.ndarray]]:
    """The scene of a window, the row and column of its first patch, and the arrays to train on."""
    row, column = rng.randint(0, GRID - window), rng.randint(0, GRID - window)
    share = window / GRID
    most = 5 if share > 0.75 else 4 if share > 0.6 else 3 if share > 0.4 else 2
    fewest = rng.choice((1, max(1, most - 2)))  # full canvases teach more for the same price
    scene = draw_scene(rng, window * PATCH_SIZE, window * PATCH_SIZE, (fewest, most), label_share)
    cells = window * window
    cover = scene.cover.reshape(window, PATCH_SIZE, window, PATCH_SIZE)
    out = {
        "pixels": normalise(np.asarray(scene.image)),
        "positions": ((row + np.arange(window))[:, None] * GRID + column + np.arange(window)).ravel(),
        "shape": np.zeros(cells, np.int64),  # 0 is background
        "color": np.zeros(cells, np.int64),
        "center": np.zeros((cells, 2), np.float32),  # of the full picture, 0 to 1
        "label": np.full((cells, LABEL_LENGTH), IGNORE, np.int64),  # 0 is "no character"
        "glyph": _glyphs(scene.glyphs, window),
        "count": np.array(len(scene.objects) - 1, np.int64),
        "present": np.zeros(len(SHAPES) + len(COLORS), np.float32),
    }
    for number, item in enumerate(scene.objects, 1):
        part = (cover == number).mean((1, 3)).ravel()
        on, edge = part >= 0.2, (part > 0.02) & (part < 0.2)
        out["shape"][edge & (out["shape"] == 0)] = IGNORE
        out["shape"][on] = 1 + SHAPES.index(item.shape)
        out["color"][on] = 1 + _COLOR_NAMES.index(item.color)
        out["center"][on] = ((column + item.x / PATCH_SIZE) / GRID, (row + item.y / PATCH_SIZE) / GRID)
        characters = [1 + CHARACTERS.index(c) for c in item.label]
        out["label"][on] = characters + [0] * (LABEL_LENGTH - len(characters))
        out["present"][SHAPES.index(item.shape)] = 1
        out["present"][len(SHAPES) + _COLOR_NAMES.index(item.color)] = 1
    out["color"][out["shape"] == IGNORE] = IGNORE
    return scene, row, column, out


def _glyphs(glyphs: np.ndarray, window: int) -> np.ndarray:
    """The character that most of each patch with a good part of one shows, int64 (window * window,)."""
    patches = glyphs.reshape(window, PATCH_SIZE, window, PATCH_SIZE).transpose(0, 2, 1, 3).reshape(window * window, -1)
    found = np.full(len(patches), IGNORE, np.int64)
    for i in np.flatnonzero((patches > 0).mean(1) >= 0.25):
        codes = np.bincount(patches[i][patches[i] > 0])
        found[i] = CHARACTERS.index(chr(int(codes.argmax())))
    return found


class Heads(nn.Module):
    """Linear read-outs of every patch and of [CLS]; used in training only."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        sizes = [1 + len(SHAPES), 1 + len(COLORS), 2] + [1 + len(CHARACTERS)] * LABEL_LENGTH + [len(CHARACTERS), 5]
        self.sizes = sizes
        self.patch = nn.Linear(dim, sum(sizes))
        self.whole = nn.Linear(dim, len(SHAPES) + len(COLORS))

    def forward(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """hidden (B, 1 + T, D) -> the summed loss and what to print."""
        hidden = self.norm(hidden)
        shape, color, center, *label, glyph, count = self.patch(hidden[:, 1:]).split(self.sizes, 2)
        on = batch["shape"] > 0
        weight = torch.ones(shape.shape[-1])
        weight[0] = 0.25  # most patches are background
        losses = {
            "shape": F.cross_entropy(shape.flatten(0, 1), batch["shape"].flatten(), weight.to(shape.device)),
            "color": F.cross_entropy(color.flatten(0, 1), batch["color"].flatten(), weight.to(color.device)),
            "center": 10 * F.smooth_l1_loss(center[on], batch["center"][on], beta=0.02),
            "label": sum(F.cross_entropy(o[on], batch["label"][on][:, i]) for i, o in enumerate(label)) / 1.5,
            # a sum: a part of a batch may show no label at all, and a mean over nothing is not a number
            "glyph": F.cross_entropy(
                glyph.flatten(0, 1), batch["glyph"].flatten(), ignore_index=IGNORE, reduction="sum"
            )
            / (batch["glyph"] != IGNORE).sum().clamp(min=1),
            "count": 0.3
            * F.cross_entropy(count.flatten(0, 1), batch["count"][:, None].expand(count.shape[:2]).flatten()),
            "present": F.binary_cross_entropy_with_logits(self.whole(hidden[:, 0]), batch["present"]),
        }
        with torch.no_grad():
            seen = batch["glyph"] != IGNORE
            first = label[0][on].argmax(-1)
            written = batch["label"][on][:, 0] > 0
            shown = {
                "shape": (shape[on].argmax(-1) == batch["shape"][on]).float().mean(),
                "color": (color[on].argmax(-1) == batch["color"][on]).float().mean(),
                "center": (center[on] - batch["center"][on]).abs().mean() * GRID,  # in patches
                "char1": (first == batch["label"][on][:, 0])[written].float().sum() / written.sum().clamp(min=1),
                "glyph": (glyph[seen].argmax(-1) == batch["glyph"][seen]).float().sum() / seen.sum().clamp(min=1),
                "count": (count.argmax(-1) == batch["count"][:, None]).float().mean(),
            }
        return sum(losses.values()), {k: float(v) for k, v in shown.items()}  # type: ignore[return-value]


def loss(model: nn.Module, heads: Heads, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    return heads(encode(model, batch["pixels"], batch["positions"]), batch)  # type: ignore[arg-type]


class Examples(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Example number i of a stage, made from its number alone: any run can stop and go on."""

    def __init__(self, make: object, prefix: str, start: int, stop: int, **options: object):
        self.make, self.prefix, self.start, self.stop, self.options = make, prefix, start, stop, options

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.make(f"{self.prefix}:{self.start + i}", **self.options)  # type: ignore[operator]

    def batches(self, size: int, workers: int) -> Iterator[Batch]:
        return iter(
            torch.utils.data.DataLoader(
                self, size, num_workers=workers, drop_last=True, prefetch_factor=4 if workers else None
            )
        )
