"""Qwen2.5-VL: pictures of any size, attention in windows, four patches merged into a token, positions of three axes.

A tile is a window. The selection sees a token as the merger's layers do: its four patches side by side, after the
merger's norm. The layers run on the kept tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import VisionSpec
from svdprune.exporter.families.qwen import VISUAL, Qwen, inputs_of, shape_of
from svdprune.exporter.towers.layers import filled
from svdprune.exporter.towers.qwen import Shape
from svdprune.exporter.towers.qwen2_5_vl import DEFAULTS, Merger, Qwen25Tower
from svdprune.runtime.errors import UserError


class Qwen25Vl(Qwen):
    """See `svdprune.exporter.families.base.Family`."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        vision = _vision(checkpoint)
        return self.spec(checkpoint, vision, _shape(checkpoint, vision))

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision = _vision(checkpoint)
        with torch.device("meta"):
            tower = Qwen25Tower(vision, _shape(checkpoint, vision))
        filled(tower, checkpoint, VISUAL)
        tower.patch_embed.fold()
        return tower

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        vision = _vision(checkpoint)
        with torch.device("meta"):
            merger = Merger(vision["spatial_merge_size"] ** 2 * vision["hidden_size"], vision["out_hidden_size"])
        return filled(merger, checkpoint, VISUAL + "merger.")

    def reference_tokens(self, model: Any, pixels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tokens,) = inputs_of(model, pixels, places, [model.model.visual.merger.mlp])
        return tokens, None

    def reference_project(self, model: Any, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.visual.merger.mlp(rows)
        return projected


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**DEFAULTS, **checkpoint.config["vision_config"]}


def _shape(checkpoint: Checkpoint, vision: dict[str, Any]) -> Shape:
    token = vision["patch_size"] * vision["spatial_merge_size"]
    if vision["window_size"] < token:
        raise UserError(f"window_size {vision['window_size']} is less than a token of {token} pixels: not supported")
    return shape_of(checkpoint, vision, vision["window_size"] // token)


FAMILY = Qwen25Vl()
