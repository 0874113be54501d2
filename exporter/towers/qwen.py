"""The vision transformers of Qwen2.5-VL and Qwen3-VL on tiles of a picture of any size; names are transformers'.

Tokens never leave their tile: (N, P, D) for N tiles of P patches, token by token, the patches of a token together. A
layer attends inside each tile (a window) or over all tiles as one sequence. Where a tile is larger than a token, the
patches beyond the picture's edge are left out of all attention. Their own rows hold finite values that nobody reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import nn

from svdprune.exporter.towers.layers import activation

OUTSIDE = -3e4  # added to the scores of patches beyond the edge: exp of it is 0, in half precision, too


@dataclass(frozen=True)
class Shape:
    """How a tower takes a picture.

    patch: pixels of a patch's side. merge: patches of a token's side. side: tokens of a tile's side. frames: pictures
    in time that the patch embedding takes, all of them the same one. theta: base of the rotary frequencies.
    """

    patch: int
    merge: int
    side: int
    frames: int
    theta: float

    @property
    def patches(self) -> int:
        """P, patches of a tile."""
        return (self.side * self.merge) ** 2


class Around(NamedTuple):
    """What attention needs to know of the patches. cos, sin: (N, P, 1, head). window: (N, 1, 1, P) and whole:
    (1, 1, 1, N * P), or (1, 1, N * P, N * P) of several pictures, are added to the scores; None where nothing is left
    out."""

    cos: torch.Tensor
    sin: torch.Tensor
    window: torch.Tensor | None
    whole: torch.Tensor | None


class RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class PatchEmbed(nn.Module):
    """The convolution over patches as a matrix product, its kernel summed over the equal pictures in time."""

    def __init__(self, shape: Shape, dim: int, bias: bool):
        super().__init__()
        self.shape = shape
        self.proj: nn.Module = nn.Conv3d(3, dim, (shape.frames, shape.patch, shape.patch), bias=bias)

    def fold(self) -> None:
        """Sum the kernel, once its values are there."""
        kernel = cast(torch.Tensor, self.proj.weight).float().sum(2).flatten(1)  # (D, 3 * patch^2)
        bias = cast("torch.Tensor | None", self.proj.bias)
        linear = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(kernel, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.proj = linear

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        s = self.shape
        split = (s.side, s.merge, s.patch)
        x = pixels.reshape(-1, 3, *split, *split)  # (N, 3, row of tokens, of patches, of pixels, the same of columns)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, s.patches, 3 * s.patch**2)
        embedded: torch.Tensor = self.proj(x)  # (N, P, D)
        return embedded


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, around: Around, windowed: bool) -> torch.Tensor:
        n, p, d = x.shape
        head = d // self.heads
        q, k, v = self.qkv(x).split(d, 2)
        q, k = (_turned(t.reshape(n, p, self.heads, head), around) for t in (q, k))
        v = v.reshape(n, p, self.heads, head)
        mask = around.window
        if not windowed:
            q, k, v = (t.reshape(1, n * p, self.heads, head) for t in (q, k, v))
            mask = around.whole
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(head)
        weights = (scores if mask is None else scores + mask).softmax(3)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, p, d))


def _turned(x: torch.Tensor, around: Around) -> torch.Tensor:
    first, second = x.chunk(2, 3)
    return x * around.cos + torch.cat([-second, first], 3) * around.sin


class GatedMlp(nn.Module):
    def __init__(self, dim: int, inner: int, act: str):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.down_proj = nn.Linear(inner, dim)
        self.act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Mlp(nn.Module):
    def __init__(self, dim: int, inner: int, act: str):
        super().__init__()
        self.linear_fc1, self.linear_fc2, self.act = nn.Linear(dim, inner), nn.Linear(inner, dim), activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class Block(nn.Module):
    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: Attention, mlp: nn.Module, windowed: bool):
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn, self.mlp, self.windowed = attention, mlp, windowed

    def forward(self, x: torch.Tensor, around: Around) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), around, self.windowed)
        return x + self.mlp(self.norm2(x))


def patch_positions(places: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Row and column of every patch in the picture, float32 (N, P, 2), from `places` (N, 4) of the tiling."""
    tile, inner = range(shape.side), range(shape.merge)
    inside = [(y * shape.merge + a, x * shape.merge + b) for y in tile for x in tile for a in inner for b in inner]
    return places[:, None, :2] + torch.tensor(inside, dtype=torch.float32)


def around(
    places: torch.Tensor, positions: torch.Tensor, shape: Shape, head: int, dtype: torch.dtype, pictures: int
) -> Around:
    """Rotary angles of the patches' rows and columns, and the masks of those beyond the edge and of other pictures.

    Args:
        places: float32 (N, 4), of the tiling. positions: float32 (N, P, 2). head: channels of an attention head.
        pictures: how many the tiles may be of, one after the other.
    """
    quarter = torch.arange(0, head // 2, 2, dtype=torch.float32) / (head // 2)
    angles = (positions[..., None] * (1.0 / shape.theta**quarter)).flatten(2)  # (N, P, head / 2): rows', then columns'
    angles = torch.cat([angles, angles], 2)[:, :, None]  # (N, P, 1, head)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    others = None
    if pictures > 1:
        number = (places[:, :2].amax(1) <= 0).float().cumsum(0)  # (N,): a picture's first tile has its first patch
        apart = ((number[:, None] - number).abs() > 0.5).to(dtype) * OUTSIDE  # (N, N)
        n, p = positions.shape[:2]
        others = apart[:, None, :, None].expand(n, p, n, p).reshape(1, 1, n * p, n * p)
    if shape.side == 1:
        return Around(cos, sin, None, others)
    # At most one of a patch's row and column distances decides: beyond the edge where either is not below its end.
    over = ((positions - places[:, None, 2:]).amax(2) >= 0).to(dtype) * OUTSIDE  # (N, P)
    beyond = over.reshape(1, 1, 1, -1)
    return Around(cos, sin, over[:, None, None], beyond if others is None else torch.minimum(beyond, others))
