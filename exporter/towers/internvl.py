"""InternViT: pre-norm layers with a learned scale after each part, [CLS] dropped, then the pixel shuffle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from svdprune.exporter.towers.layers import Mlp
from svdprune.exporter.towers.shuffle import joined_attention, pixel_shuffle
from svdprune.runtime.errors import UserError

# Defaults of transformers' InternVLVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
_QK_EPSILON = 1e-6  # of the norms of queries and keys, whatever the config says


class RmsNorm(nn.Module):
    """In float32 whatever the input, as transformers computes it."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def _norm(c: Mapping[str, Any]) -> nn.Module:
    kind, dim, eps = c["norm_type"], c["hidden_size"], c["layer_norm_eps"]
    if kind == "layer_norm":
        return nn.LayerNorm(dim, eps)
    if kind == "rms_norm":
        return RmsNorm(dim, eps)
    raise UserError(f"norm_type {kind!r} is not supported: supported are layer_norm and rms_norm")


class Attention(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=c["attention_bias"]) for _ in range(3))
        self.projection_layer = nn.Linear(dim, dim)
        normed = c["use_qk_norm"]
        self.q_norm, self.k_norm = (RmsNorm(dim, _QK_EPSILON) if normed else nn.Identity() for _ in range(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)

    def _weights(self, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k = self._split(self.q_norm(self.q_proj(queries))), self._split(self.k_norm(self.k_proj(x)))
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self._weights(x, x) @ self._split(self.v_proj(x))
        return self.projection_layer(seen.transpose(1, 2).flatten(2))

    def first_row(self, x: torch.Tensor) -> torch.Tensor:
        """How much [CLS] attends to each patch, averaged over heads: (B, 1 + T, D) -> (B, T)."""
        return self._weights(x[:, :1], x).mean(1)[:, 0, 1:]


class Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim = c["hidden_size"]
        self.layernorm_before, self.layernorm_after = _norm(c), _norm(c)
        self.attention, self.mlp = Attention(c), Mlp(dim, c["intermediate_size"], c["hidden_act"])
        self.lambda_1, self.lambda_2 = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class PatchEmbeddings(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        self.projection = nn.Conv2d(3, c["hidden_size"], c["patch_size"], c["patch_size"])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projection(pixels).flatten(2).transpose(1, 2)  # (B, T, D)


class Embeddings(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, patches = c["hidden_size"], (c["image_size"] // c["patch_size"]) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.patch_embeddings = PatchEmbeddings(c)
        self.placed = c["use_absolute_position_embeddings"]
        if self.placed:
            self.position_embeddings = nn.Parameter(torch.empty(1, 1 + patches, dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embeddings(pixels)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)  # (B, 1 + T, D)
        return x + self.position_embeddings if self.placed else x


class Encoder(nn.Module):
    """Holds the layers under the name they have in checkpoints."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.layer = nn.ModuleList([Layer(c) for _ in range(depth)])


class InternVisionTower(nn.Module):
    """InternViT up to and with layer `depth`, then the pixel shuffle by `factor`; parameter names are transformers'.

    `last_norm`: with the norm after the last layer.
    """

    def __init__(self, c: Mapping[str, Any], depth: int, last_norm: bool, factor: int):
        super().__init__()
        self.embeddings, self.encoder = Embeddings(c), Encoder(c, depth)
        self.last_norm = last_norm
        if last_norm:
            self.layernorm = nn.LayerNorm(c["hidden_size"], c["layer_norm_eps"])
        self.side, self.factor = c["image_size"] // c["patch_size"], factor

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, height, width) -> joined tokens (B, (side / factor)^2, D * factor^2) and the attention to each."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layer[:-1]:
            x = layer(x)
        last = cast(Layer, self.encoder.layer[-1])
        attention = last.attention.first_row(last.layernorm_before(x))
        x = last(x)
        x = self.layernorm(x) if self.last_norm else x
        return pixel_shuffle(x[:, 1:], self.side, self.factor), joined_attention(attention, self.side, self.factor)
