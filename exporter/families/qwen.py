"""What Qwen2.5-VL and Qwen3-VL share: pictures of any size, and the reference on tiles put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import Plain, VisionSpec
from svdprune.exporter.processor import image_processor, image_values
from svdprune.exporter.towers.qwen import Shape
from svdprune.runtime.errors import UserError
from svdprune.runtime.tiling.patches import PLACES

VISUAL = "model.visual."
TOKENS = 1280  # of a picture at most, where no other limit is asked for: what attention costs grows with their square
# Sizes of transformers' Qwen2VLImageProcessor: a preprocessor_config.json may leave them out.
_LEAST, _MOST = 56 * 56, 28 * 28 * 1280


def shape_of(checkpoint: Checkpoint, vision: Mapping[str, Any], side: int) -> Shape:
    """How the tower takes a picture, in tiles of `side` tokens.

    Raises:
        UserError: an image processor of another model.
    """
    processor = image_processor(checkpoint)
    sizes = []
    for name, mine, default in (
        ("patch_size", "patch_size", 14),
        ("merge_size", "spatial_merge_size", 2),
        ("temporal_patch_size", "temporal_patch_size", 2),
    ):
        if processor.get(name, default) != vision[mine]:
            raise UserError(
                f"the processor's {name} is {processor.get(name, default)} and the vision tower's {mine} is "
                f"{vision[mine]}: the checkpoint's processor does not belong to its model"
            )
        sizes.append(int(vision[mine]))
    patch, merge, frames = sizes
    rotary = vision.get("rope_parameters") or {}
    return Shape(patch, merge, side, frames, float(rotary.get("rope_theta", 10000.0)))


class Qwen(Plain):
    """The members of `Family` that both have."""

    def spec(self, checkpoint: Checkpoint, vision: Mapping[str, Any], shape: Shape, **more: Any) -> VisionSpec:
        """Sizes, with a picture of at most 1280 tokens, or what the processor allows if that is less."""
        image, processor = image_values(checkpoint), image_processor(checkpoint)
        if not processor.get("do_resize", True):
            raise UserError("the image processor does not resize pictures, which this model needs: set do_resize")
        least, most = _pixel_limits(processor)
        token = shape.patch * shape.merge
        tiling = {
            "kind": "patches",
            "patch": shape.patch,
            "merge": shape.merge,
            "side": shape.side,
            "min_pixels": least,
            "max_pixels": max(least, min(most, TOKENS * token**2)),
        }
        return VisionSpec(
            height=token * shape.side,
            width=token * shape.side,
            grid=(shape.side, shape.side),
            channels=shape.merge**2 * vision["hidden_size"],
            hidden=vision["out_hidden_size"],
            tap=-1,
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
            tiling=tiling,
            pixels=(least, most),
            cls=False,
            extras={PLACES: [4]},
            positions="original",  # the model knows rows and columns by them alone
            **more,
        )


def _pixel_limits(processor: Mapping[str, Any]) -> tuple[int, int]:
    """The fewest and the most pixels of a resized picture, under the names of any release."""
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or _LEAST
    most = processor.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or _MOST
    return int(least), int(most)


def inputs_of(
    model: Any, pixels: torch.Tensor, places: torch.Tensor, modules: Sequence[nn.Module]
) -> list[torch.Tensor]:
    """What some modules of transformers' vision tower are given for a picture, each (N, T, D) as our tiles have it.

    Args:
        pixels: the tiles (N, 3, tile, tile), normalised. places: float32 (N, 4), of the tiling.
        modules: each takes all the picture's tokens, tile by tile, the patches of a token side by side.
    """
    vision = model.config.vision_config
    patch, merge, tile = vision.patch_size, vision.spatial_merge_size, pixels.shape[2]
    side = tile // (patch * merge)
    high, wide = (int(end) for end in places[0, 2:])
    across = -(-wide // (side * merge))
    whole = pixels.reshape(-1, across, 3, tile, tile).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    whole = whole[:, : high * patch, : wide * patch]
    split = whole.reshape(3, high // merge, merge, patch, wide // merge, merge, patch)
    patches = split.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # rows, columns of tokens, in a token, channel
    patches = patches.expand(*patches.shape[:5], vision.temporal_patch_size, patch, patch).reshape(high * wide, -1)
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        return lambda module, given: seen.__setitem__(number, given[0])

    hooks = [module.register_forward_pre_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        model.model.visual(patches, grid_thw=torch.tensor([[1, high, wide]]))
    finally:
        for hook in hooks:
            hook.remove()
    inside = torch.tensor([(y, x) for y in range(side) for x in range(side)])
    token = places[:, None, :2] / merge + inside  # (N, T, 2)
    present = (token < places[:, None, 2:] / merge).all(2)  # (N, T)
    laid = []
    for number in range(len(modules)):
        rows = seen[number].reshape(high * wide // merge**2, -1)
        spread = rows.new_zeros(*present.shape, rows.shape[1])
        spread[present] = rows
        laid.append(spread)
    return laid
