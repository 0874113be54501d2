"""Qwen3-VL's vision transformer: layers over the whole picture, learned positions resampled to its grid, DeepStack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.towers.layers import activation
from svdprune.exporter.towers.qwen import Attention, Block, Mlp, PatchEmbed, Shape, around, patch_positions

# Defaults of transformers' Qwen3VLVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
EPS = 1e-6


class MergerNorm(nn.Module):
    """The merger's norm, patch by patch; what follows it comes after the selection."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed


class LearnedPositions(nn.Module):
    """A square table of positions, resampled bilinearly to the picture's grid, corners on corners."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.side = round(count**0.5)
        self.weight = nn.Parameter(torch.empty(count, dim))

    def forward(self, positions: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows and columns float32 (N, P, 2) in grids of float32 (N, 2) -> (N, P, D)."""
        last = float(self.side - 1)
        spots = positions * last / (ends[:, None] - 1.0).clamp(min=1.0)
        low = spots.floor()
        share, high = (spots - low).to(self.weight.dtype), (low + 1.0).clamp(max=last)
        total: torch.Tensor | None = None
        for row, down in ((low, 1 - share), (high, share)):
            for column, across in ((low, 1 - share), (high, share)):
                index = (row[..., 0] * float(self.side) + column[..., 1]).long()
                part = self.weight[index] * (down[..., :1] * across[..., 1:])
                total = part if total is None else total + part
        assert total is not None  # there are four corners
        return total


class Qwen3Tower(nn.Module):
    """`pictures` is how many the tiles may be of."""

    pictures = 1

    def __init__(self, c: Mapping[str, Any], shape: Shape):
        super().__init__()
        dim, self.shape, self.heads = c["hidden_size"], shape, c["num_heads"]
        self.levels = list(c["deepstack_visual_indexes"])
        self.patch_embed = PatchEmbed(shape, dim, bias=True)
        self.pos_embed = LearnedPositions(c["num_position_embeddings"], dim)
        self.blocks = nn.ModuleList(
            Block(
                (nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)),
                Attention(dim, self.heads),
                Mlp(dim, c["intermediate_size"], c["hidden_act"]),
                windowed=False,
            )
            for _ in range(c["depth"])
        )
        self.merger = MergerNorm(dim)

    def forward(self, pixels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Tiles (N, 3, height, width) and float32 (N, 4) -> tokens (N, T, D), no [CLS] attention, levels (N, T, L * D).

        D is four patches' channels side by side, as the mergers' first layers take them.
        """
        positions = patch_positions(places, self.shape)
        x = self.patch_embed(pixels)  # (N, P, dim)
        near = around(places, positions, self.shape, x.shape[2] // self.heads, x.dtype, self.pictures)
        x = x + self.pos_embed(positions, places[:, 2:])
        shape = (-1, self.shape.side**2, self.shape.merge**2 * x.shape[2])
        levels = {}
        for number, block in enumerate(self.blocks):
            x = block(x, near)
            if number in self.levels:
                levels[number] = x.reshape(shape)
        tokens = self.merger(x).reshape(shape)
        return (tokens, None, torch.cat([levels[n] for n in sorted(levels)], 2)) if levels else (tokens, None)


class Merger(nn.Module):
    """What the merger does to a token after its norm."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(channels, channels), nn.Linear(channels, hidden)
        self.act = activation("gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.linear_fc2(self.act(self.linear_fc1(x)))
        return projected


class LevelMerger(Merger):
    """The merger of a DeepStack level, whose norm is over the whole token."""

    def __init__(self, channels: int, hidden: int):
        super().__init__(channels, hidden)
        self.norm = nn.LayerNorm(channels, EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


class LevelMergers(nn.ModuleList):
    """All levels' mergers: (B, K, L * D) -> (B, L, K, H)."""

    def __init__(self, levels: int, channels: int, hidden: int):
        super().__init__(LevelMerger(channels, hidden) for _ in range(levels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self), 2)
        return torch.stack([merger(part) for merger, part in zip(self, parts, strict=True)], 1)
