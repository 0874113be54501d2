"""SigLIP's vision transformer: no [CLS] token; its last norm is there for who takes what follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.towers.layers import Encoder

# Defaults of transformers' SiglipVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


class Embeddings(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, patch = c["hidden_size"], c["patch_size"]
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch)
        self.position_embedding = nn.Embedding((c["image_size"] // patch) ** 2, dim)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, T, D)
        return patches + self.position_embedding.weight


class SiglipTower(nn.Module):
    """SigLIP up to and with layer `depth`, or with `last_norm` to its end; parameter names are transformers'."""

    def __init__(self, c: Mapping[str, Any], depth: int, last_norm: bool = False):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Encoder(c, depth)
        if last_norm:
            self.post_layernorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.last_norm = last_norm

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, 3, height, width) -> tokens (B, T, D), and no [CLS] attention."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return (self.post_layernorm(x) if self.last_norm else x), None
