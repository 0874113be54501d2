"""CLIP's vision transformer, read at a layer before its last: [CLS] dropped from the tokens, its attention given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from svdprune.exporter.towers.layers import Encoder, Layer

# Defaults of transformers' CLIPVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class Embeddings(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, patch = c["hidden_size"], c["patch_size"]
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.position_embedding = nn.Embedding(1 + (c["image_size"] // patch) ** 2, dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, T, D)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight  # (B, 1 + T, D)


class ClipTower(nn.Module):
    """CLIP's vision transformer up to and with layer `depth`; parameter names are transformers'."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.encoder = Encoder(c, depth)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, height, width) -> tokens (B, T, D), [CLS] attention of the last layer run (B, T)."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        last = cast(Layer, self.encoder.layers[-1])
        attention = last.self_attn.first_row(last.layer_norm1(x))
        return last(x)[:, 1:], attention
