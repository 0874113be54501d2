"""Pixel shuffle: the tokens of a square of patches become one, their features side by side."""

from __future__ import annotations

import torch


def pixel_shuffle(x: torch.Tensor, side: int, factor: int) -> torch.Tensor:
    """Tokens (B, side * side, D) -> (B, (side / factor)^2, factor^2 * D), row by row within a square as outside it."""
    x = torch.unflatten(x, 1, (side // factor, factor, side // factor, factor))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def joined_attention(attention: torch.Tensor, side: int, factor: int) -> torch.Tensor:
    """How much the patches (B, side * side) of each square are attended to together, (B, (side / factor)^2)."""
    x = torch.unflatten(attention, 1, (side // factor, factor, side // factor, factor))
    return x.sum((2, 4)).flatten(1)
