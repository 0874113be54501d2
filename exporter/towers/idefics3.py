"""The vision tower of Idefics3 and SmolVLM: SigLIP to its end, its positions taken by their place in the picture.

The positions of a tile of other than the trained size are those of the trained grid at the same share of the height and
width. Every tile of a picture is whole, so they are constants, chosen when the weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.towers.shuffle import pixel_shuffle
from svdprune.exporter.towers.siglip import SiglipTower

# Defaults of transformers' Idefics3VisionConfig and SmolVLMVisionConfig: a config.json may leave these out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def position_ids(side: int, trained: int) -> torch.Tensor:
    """Which of `trained` x `trained` positions the patches of a tile of `side` x `side` have, int64 (side * side,).

    In the float32 arithmetic of transformers' `Idefics3VisionEmbeddings`, whose rounding decides at the boundaries.
    """
    boundaries = torch.arange(1 / trained, 1.0, 1 / trained)
    share = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    bucket = torch.bucketize(share, boundaries, right=True)
    return (bucket[:, None] * trained + bucket[None]).flatten()


class Idefics3Tower(SiglipTower):
    """The whole tower, then the pixel shuffle by `factor`; parameter names are transformers'.

    Its positions are the trained ones until `place` takes those of a tile of `side` x `side` patches.
    """

    def __init__(self, c: Mapping[str, Any], side: int, factor: int):
        super().__init__(c, c["num_hidden_layers"], last_norm=True)
        self.trained, self.side, self.factor = c["image_size"] // c["patch_size"], side, factor

    def place(self) -> None:
        """Put the positions of the tile in place of the trained ones; once, after the weights are read."""
        table = self.embeddings.position_embedding.weight
        chosen = table[position_ids(self.side, self.trained)]
        self.embeddings.position_embedding.weight = nn.Parameter(chosen, requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, 3, height, width) -> joined tokens (B, (side / factor)^2, D * factor^2), and no [CLS] attention."""
        x, _ = super().forward(pixels)
        return pixel_shuffle(x, self.side, self.factor), None
