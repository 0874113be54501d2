"""What an export does besides for a model that cuts pictures into tiles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families import Family, VisionSpec
from svdprune.exporter.families.base import Budget
from svdprune.exporter.processor import image_values
from svdprune.exporter.selection.registry import selector_entry
from svdprune.runtime.errors import UserError

MARKS = "processor/marks.npy"


def described(
    family: Family,
    checkpoint: Checkpoint,
    budget: Budget,
    pictures: int | None = None,
    max_pixels: int | None = None,
) -> VisionSpec:
    """The family's spec with the budget asked for, and the largest picture, for a family that takes any size.

    Raises:
        UserError: a budget by tile for a family without tiles or with tiles of a few tokens, one over a prompt without
            a number of pictures, or a largest picture that cannot be.
    """
    spec = family.describe(checkpoint)
    if max_pixels is not None:
        spec = _with_largest(spec, family.name, max_pixels)
    if spec.pixels is not None and budget == "tile":
        raise UserError(
            f"the tiles of {family.name} have a few tokens each, too few to choose from: use --budget picture"
        )
    if spec.tiling is None and budget == "tile":
        raise UserError(f"the family {family.name} does not cut pictures into tiles: leave out --budget tile")
    if pictures is not None and pictures < 1:
        raise UserError(f"a prompt of {pictures} pictures cannot be: give 1 or more")
    tiling = spec.tiling
    if budget == "prompt":
        if pictures is None:
            raise UserError(
                "--budget prompt is over all pictures of a prompt: say how many at most, --prompt-pictures N"
            )
        if tiling is None:
            image = image_values(checkpoint)
            sizes = {"height": spec.height, "width": spec.width, "grid": list(spec.grid)}
            tiling = {"kind": "whole", **sizes, "resize": image["resize"], "crop": image["crop"]}
    return dataclasses.replace(spec, budget=budget, pictures=pictures or 1, tiling=tiling)


def check_selector(family: Family, spec: VisionSpec, select: str) -> None:
    """Refuse a selector that the family's encoder gives too little for.

    Raises:
        UserError: [CLS] attention of an encoder without [CLS].
    """
    if selector_entry(select).needs_cls_attention and not spec.cls:
        raise UserError(
            f"the selector `{select}` needs a [CLS] token, which the encoder of {family.name} does not have"
        )


def _with_largest(spec: VisionSpec, family: str, max_pixels: int) -> VisionSpec:
    if spec.pixels is None or spec.tiling is None:
        raise UserError(f"the family {family} takes pictures of fixed sizes: leave out --max-pixels")
    least, most = spec.pixels
    if not least <= max_pixels <= most:
        raise UserError(
            f"--max-pixels is {max_pixels:,}, the model's processor makes pictures of {least:,} to {most:,} pixels: "
            "give a number between them"
        )
    return dataclasses.replace(spec, tiling={**spec.tiling, "max_pixels": max_pixels})


def write_marks(family: Family, checkpoint: Checkpoint, folder: Path) -> np.ndarray | None:
    """Write the family's rows between tokens, float32 (E, H), into the bundle; None where it has none."""
    marks = family.marks(checkpoint)
    if marks is None:
        return None
    rows: np.ndarray = marks.float().numpy()
    with (folder / MARKS).open("wb") as file:
        np.save(file, rows)
    return rows
