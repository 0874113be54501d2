"""Qwen3-VL: pictures of any size, learned positions resampled to them, DeepStack levels beside the tokens.

A tile is one token, so no tile reaches beyond the picture. The selection sees a token as the merger's layers do: its
four patches side by side, after the merger's norm. The levels are gathered by the same indices, and all mergers run on
the kept tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import VisionSpec
from svdprune.exporter.families.qwen import VISUAL, Qwen, inputs_of, shape_of
from svdprune.exporter.towers.layers import filled
from svdprune.exporter.towers.qwen3_vl import DEFAULTS, LevelMergers, Merger, Qwen3Tower
from svdprune.runtime.errors import UserError


class Qwen3Vl(Qwen):
    """See `svdprune.exporter.families.base.Family`."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        vision = _vision(checkpoint)
        levels, count = list(vision["deepstack_visual_indexes"]), vision["num_position_embeddings"]
        if levels != sorted({level for level in levels if 0 <= level < vision["depth"]}):
            raise UserError(
                f"deepstack_visual_indexes {levels} must rise and be below the tower's depth of {vision['depth']}"
            )
        if round(count**0.5) ** 2 != count:
            raise UserError(f"num_position_embeddings {count} is no square table: not supported")
        return self.spec(checkpoint, vision, shape_of(checkpoint, vision, 1), deepstack=len(levels))

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision = _vision(checkpoint)
        with torch.device("meta"):
            tower = Qwen3Tower(vision, shape_of(checkpoint, vision, 1))
        filled(tower, checkpoint, VISUAL)
        tower.patch_embed.fold()
        return tower

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        with torch.device("meta"):
            merger = Merger(*_widths(_vision(checkpoint)))
        return filled(merger, checkpoint, VISUAL + "merger.")

    def deepstack(self, checkpoint: Checkpoint) -> nn.Module | None:
        vision = _vision(checkpoint)
        levels = vision["deepstack_visual_indexes"]
        if not levels:
            return None
        with torch.device("meta"):
            mergers = LevelMergers(len(levels), *_widths(vision))
        return filled(mergers, checkpoint, VISUAL + "deepstack_merger_list.")

    def reference_tokens(self, model: Any, pixels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tokens,) = inputs_of(model, pixels, places, [model.model.visual.merger.linear_fc1])
        return tokens, None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        merger = model.model.visual.merger
        projected: torch.Tensor = merger.linear_fc2(merger.act_fn(merger.linear_fc1(rows)))
        return projected

    def reference_levels(self, model: Any, pixels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return torch.cat(inputs_of(model, pixels, places, list(model.model.visual.deepstack_merger_list)), 2)

    def reference_deepstack(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        mergers = model.model.visual.deepstack_merger_list
        batch, count = rows.shape[:2]
        parts = rows.chunk(len(mergers), 2)
        made = [merger(part.contiguous()) for merger, part in zip(mergers, parts, strict=True)]
        return torch.stack([part.reshape(batch, count, -1) for part in made], 1)


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**DEFAULTS, **checkpoint.config["vision_config"]}


def _widths(vision: dict[str, Any]) -> tuple[int, int]:
    """Channels of a token, and of the language model's embeddings."""
    return vision["spatial_merge_size"] ** 2 * vision["hidden_size"], vision["out_hidden_size"]


FAMILY = Qwen3Vl()
