"""Low-rank updates of linear layers: trained beside the frozen weights, then added into them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F


class Lora(nn.Module):
    """y = W x + B A x with W frozen; B starts at zero, so the layer starts as it was."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with the update added in."""
        self.linear.weight += self.up @ self.down
        return self.linear


def add_lora(model: nn.Module, rank: int) -> None:
    """Put a `Lora` in the place of every linear layer of `model`, in place."""
    for parent, name, layer in list(_linears(model)):
        setattr(parent, name, Lora(layer, rank))


def merge_lora(model: nn.Module) -> None:
    """Put the plain layers back, updates added, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Lora):
                setattr(parent, name, child.merged())


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The updates alone, by name."""
    return {n: p for n, p in model.named_parameters() if n.endswith((".down", ".up"))}


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child
