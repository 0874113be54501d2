"""Block-wise weights of 4 or 8 bits for com.microsoft.MatMulNBits, rounded to nearest with a searched range.

Each run of `block` weights along the input dimension has a float32 scale and a zero point of as many bits as a code:
weight = (code - zero_point) * scale. A range a little narrower than the block's own clips a few weights and rounds
all others better; of a few such shares, the one with the least squared error over the block wins. On normal weights
the error (root of the squares) is 8 % below that of the symmetric code, on heavy-tailed ones 15 %; 2 to 3 % of it is
the search's, which onnxruntime.quantization does not have. `tests/exporter/test_decoder_quantise.py` measures both.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

BLOCK = 32
# Shares of the block's range tried. At 8 bits rounding is so fine that clipping never pays.
_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}
# Blocks handled at a time: the search passes over them some forty times, so they should stay in the processor's cache.
_CHUNK = 8192


@dataclass(frozen=True)
class Quantised:
    """`codes` uint8 (N, blocks, block * bits / 8) and `zero_points` uint8 (N, ceil(blocks * bits / 8)), low bits first.

    `scales` float32 (N, blocks). A K that is no multiple of the block is padded with zeros.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int
    block: int

    def dequantise(self, inputs: int) -> np.ndarray:
        """The weights that the codes stand for: float32 (N, inputs)."""
        outputs, blocks = self.scales.shape
        codes = _unpack(self.codes, self.bits)
        zero_points = _unpack(self.zero_points, self.bits)[:, :blocks, None]
        weights: np.ndarray = (codes.astype(np.float32) - zero_points) * self.scales[..., None]  # (N, blocks, block)
        return weights.reshape(outputs, -1)[:, :inputs]


def quantise(weight: np.ndarray, bits: int, block: int = BLOCK) -> Quantised:
    """Quantise a float32 weight of shape (N, K), N outputs."""
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    grouped = np.pad(weight, ((0, 0), (0, blocks * block - inputs))).reshape(-1, block)  # (N * blocks, block)
    starts = range(0, len(grouped), _CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy lets go of the interpreter's lock
        parts = list(pool.map(lambda start: _quantise_blocks(grouped[start : start + _CHUNK], bits), starts))
    codes, scales, zero_points = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Quantised(
        _pack(codes.reshape(outputs, blocks, block), bits),
        scales.reshape(outputs, blocks),
        _pack(zero_points.reshape(outputs, blocks), bits),
        bits,
        block,
    )


def _quantise_blocks(blocks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """blocks (n, block) -> codes uint8 (n, block), scales float32 (n,), zero points uint8 (n,)."""
    top = np.float32(2**bits - 1)
    values = np.ascontiguousarray(blocks.T)  # (block, n): what is reduced over is the outer axis, which is quicker
    low = np.minimum(values.min(0), 0)  # 0 is in the range, so that it has a code: padding stays zero
    extent = np.maximum(values.max(0), 0) - low
    best_error = np.full_like(low, np.inf)
    best_scale, best_zero = np.zeros_like(low), np.zeros_like(low)
    rounded = np.empty_like(values)
    for share in map(np.float32, _SHARES[bits]):
        scale = extent * (share / top)
        inverse = _inverse(scale)
        zero = np.clip(np.rint(-low * share * inverse), 0, top)
        np.rint(np.multiply(values, inverse, out=rounded), out=rounded)
        np.clip(rounded, -zero, top - zero, out=rounded)
        rounded *= scale
        rounded -= values
        error = np.einsum("bn,bn->n", rounded, rounded)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
    codes = np.clip(np.rint(values * _inverse(best_scale)) + best_zero, 0, top)
    return codes.T.astype(np.uint8), best_scale, best_zero.astype(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for a block of zeros."""
    inverse: np.ndarray = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return inverse


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two 4-bit codes to a byte along the last axis, which is padded to an even length; 8-bit codes as they are."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    packed: np.ndarray = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
