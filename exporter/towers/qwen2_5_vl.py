"""Qwen2.5-VL's vision transformer: windows of a tile, a few layers over the whole picture, no learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.towers.layers import activation
from svdprune.exporter.towers.qwen import (
    Attention,
    Block,
    GatedMlp,
    PatchEmbed,
    RmsNorm,
    Shape,
    around,
    patch_positions,
)

# Defaults of transformers' Qwen2_5_VLVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


class MergerNorm(nn.Module):
    """The merger's norm, patch by patch; what follows it comes after the selection."""

    def __init__(self, dim: int):
        super().__init__()
        self.ln_q = RmsNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln_q(x)


class Qwen25Tower(nn.Module):
    """`pictures` is how many the tiles may be of."""

    pictures = 1

    def __init__(self, c: Mapping[str, Any], shape: Shape):
        super().__init__()
        dim, self.shape, self.heads = c["hidden_size"], shape, c["num_heads"]
        self.patch_embed = PatchEmbed(shape, dim, bias=False)
        self.blocks = nn.ModuleList(
            Block(
                (RmsNorm(dim), RmsNorm(dim)),
                Attention(dim, self.heads),
                GatedMlp(dim, c["intermediate_size"], c["hidden_act"]),
                number not in c["fullatt_block_indexes"],
            )
            for number in range(c["depth"])
        )
        self.merger = MergerNorm(dim)

    def forward(self, pixels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Tiles (N, 3, height, width) and float32 (N, 4) -> tokens (N, T, D), and no [CLS] attention.

        D is four patches' channels side by side, as the merger's first layer takes them.
        """
        x = self.patch_embed(pixels)  # (N, P, dim)
        positions, head = patch_positions(places, self.shape), x.shape[2] // self.heads
        near = around(places, positions, self.shape, head, x.dtype, self.pictures)
        for block in self.blocks:
            x = block(x, near)
        return self.merger(x).reshape(-1, self.shape.side**2, self.shape.merge**2 * x.shape[2]), None


class Merger(nn.Module):
    """What the merger does to a token, named as in checkpoints: a sequence of linear, GELU, linear."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), activation("gelu"), nn.Linear(channels, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.mlp(x)
        return projected
