"""DINOv2's vision transformer: [CLS] and patches of a picture of any size in whole patches, scaled residual branches.

The position table belongs to one size of picture; for another it is interpolated as transformers does it, once, so the
graph holds the table of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.towers.layers import Attention, Mlp
from svdprune.runtime.errors import UserError

# Defaults of transformers' Dinov2Config: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "mlp_ratio": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}

# This module's names of the attention's parts -> those in checkpoints.
_STORED = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.out_proj.": ".attention.output.dense.",
}


class PatchEmbeddings(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.projection = nn.Conv2d(3, dim, patch, patch)


class Embeddings(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, patch = c["hidden_size"], c["patch_size"]
        self.patch_embeddings = PatchEmbeddings(dim, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + (c["image_size"] // patch) ** 2, dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)  # (B, T, D)
        first = self.cls_token.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], 1) + self.position_embeddings  # (B, 1 + T, D)


class Scale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.lambda1


class Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, eps = c["hidden_size"], c["layer_norm_eps"]
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, c["num_attention_heads"])
        self.mlp = Mlp(dim, int(dim * c["mlp_ratio"]), c["hidden_act"])
        self.layer_scale1, self.layer_scale2 = Scale(dim), Scale(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """Holds the layers under the name they have in checkpoints."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.layer = nn.ModuleList([Layer(c) for _ in range(depth)])


class Dinov2Tower(nn.Module):
    """DINOv2 up to and with layer `depth`, before the last norm; parameter names are transformers'."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Encoder(c, depth)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, height, width) -> tokens (B, T, D), [CLS] attention of the last layer run (B, T)."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layer[:-1]:
            x = layer(x)
        last = cast(Layer, self.encoder.layer[-1])
        attention = last.attention.first_row(last.norm1(x))
        return last(x)[:, 1:], attention


def check_dinov2(c: Mapping[str, Any]) -> None:
    """Whether the tower can be built.

    Raises:
        UserError: a variant that it does not know.
    """
    if c["use_swiglu_ffn"]:
        raise UserError("a DINOv2 with SwiGLU layers (use_swiglu_ffn, as in the giant one) is not supported")
    if not c["qkv_bias"]:
        raise UserError("a DINOv2 without biases of queries, keys and values (qkv_bias) is not supported")
    if not isinstance(c["image_size"], int) or not isinstance(c["patch_size"], int):
        raise UserError("a DINOv2 whose image_size or patch_size is not one number is not supported")


def dinov2_tower(
    c: Mapping[str, Any], depth: int, grid: tuple[int, int], checkpoint: Checkpoint, prefix: str
) -> Dinov2Tower:
    """The tower with the checkpoint's weights, for pictures of `grid` (rows, columns) patches; keeps their dtype."""
    with torch.device("meta"):
        tower = Dinov2Tower(c, depth)
    state = {name: checkpoint.tensor(prefix + _stored(name)) for name in tower.state_dict()}
    tower.load_state_dict(state, assign=True)
    table = interpolated(tower.embeddings.position_embeddings.detach(), grid)
    tower.embeddings.position_embeddings = nn.Parameter(table)
    return tower.eval().requires_grad_(False)


def interpolated(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The positions (1, 1 + side * side, D) for a grid of (rows, columns): [CLS] as it is, patches by bicubic
    interpolation in float32."""
    first, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return table
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)


def _stored(name: str) -> str:
    for mine, theirs in _STORED.items():
        name = name.replace(mine, theirs)
    return name
