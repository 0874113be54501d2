"""What LLaVA-NeXT and LLaVA-OneVision say of their tiles: the grids to choose from, checked against the processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import VisionSpec
from svdprune.exporter.processor import image_processor, image_values
from svdprune.runtime.errors import UserError

NEWLINE = "model.image_newline"


def anyres_spec(
    checkpoint: Checkpoint, vision: Mapping[str, Any], hidden: int, tap: int, pinpoints: list[list[int]], **more: Any
) -> VisionSpec:
    """The spec of a family with such tiles.

    Args:
        vision: the vision config. hidden: H. tap: as the config counts it.
        pinpoints: of the family, where the config names none. more: fields of `AnyRes` or `VisionSpec`; `tilings`: the
            tilings `several` and `video`.

    Raises:
        UserError: config and processor do not belong together.
    """
    size, patch = vision["image_size"], vision["patch_size"]
    image, processor = image_values(checkpoint), image_processor(checkpoint)
    resize, crop = image["resize"] or {}, image["crop"] or {}
    sides = {*resize.values(), *crop.values()}
    if sides != {size}:
        raise UserError(
            f"the processor makes tiles of {sorted(sides)} pixels but the vision tower takes squares of {size}: the "
            "checkpoint's processor does not belong to its model"
        )
    chosen = checkpoint.config.get("image_grid_pinpoints") or pinpoints
    asked = processor.get("image_grid_pinpoints") or chosen
    if [list(pair) for pair in asked] != [list(pair) for pair in chosen]:
        raise UserError(
            "the processor's image_grid_pinpoints are not those of config.json: the checkpoint's processor does not "
            "belong to its model"
        )
    side = size // patch
    tiling = {
        "kind": "anyres",
        "tile": size,
        "side": side,
        "pinpoints": [list(pair) for pair in chosen],
        "pool_above": more.pop("pool_above", None),
        **more.pop("tilings", {}),
    }
    return VisionSpec(
        height=size,
        width=size,
        grid=(side, side),
        channels=vision["hidden_size"],
        hidden=hidden,
        tap=tap,
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        rescale=image["rescale"],
        tiling=tiling,
        **more,
    )


def newline(checkpoint: Checkpoint) -> torch.Tensor:
    """The learned row (1, H) that ends a line of the picture."""
    return checkpoint.tensor(NEWLINE)[None]
