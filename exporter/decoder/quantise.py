"""Block-wise round-to-nearest weights for com.microsoft.MatMulNBits, 4 or 8 bits.

Each run of `block` weights along the input dimension has one float32 scale, and the code 2^(bits-1) stands for zero.
The scale is searched, not only taken from the largest weight: of a few shrunken candidates, the one with the least
squared error over the block wins. onnxruntime.quantization has the first candidate only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 32
# Shares of the full range tried for 4 bits. At 8 bits rounding is so fine that clipping never pays.
_SHRINK = {4: tuple(1.0 - 0.04 * step for step in range(8)), 8: (1.0,)}


@dataclass(frozen=True)
class Quantised:
    """`codes` uint8 (N, blocks, block * bits / 8), low bits first; `scales` float32 (N, blocks)."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int

    def dequantise(self, inputs: int) -> np.ndarray:
        """The weights that the codes stand for: float32 (N, inputs)."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], self.block)
        signed: np.ndarray = codes.astype(np.float32) - 2 ** (self.bits - 1)  # (N, blocks, block)
        return (signed * self.scales[..., None]).reshape(len(codes), -1)[:, :inputs]


def quantise(weight: torch.Tensor, bits: int, block: int = BLOCK) -> Quantised:
    """Quantise a weight of shape (N, K), N outputs; K is padded with zeros to whole blocks."""
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    padded = torch.zeros(outputs, blocks * block)
    padded[:, :inputs] = weight
    grouped = padded.view(outputs, blocks, block)

    top = 2 ** (bits - 1)
    index = grouped.abs().argmax(-1, keepdim=True)
    extreme = grouped.gather(-1, index)  # (N, blocks, 1), signed: mapped to the code -top, the longer side of the range
    best_error = torch.full_like(extreme, torch.inf)
    best_scale = torch.zeros_like(extreme)
    for share in _SHRINK[bits]:
        scale = extreme * (share / -top)
        error = (_round(grouped, scale, top) * scale - grouped).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)

    codes = (_round(grouped, best_scale, top) + top).to(torch.uint8)  # (N, blocks, block)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Quantised(codes.numpy(), best_scale[..., 0].numpy(), bits, block)


def _round(values: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return (values * inverse).round_().clamp_(-top, top - 1)
