"""The parts that vision towers share, written out so that graphs have plain forms and weights keep their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.runtime.errors import UserError


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class GELU(nn.Module):
    """GELU by the error function, with its terms in the order that ONNX Runtime fuses (nn.GELU.s it does not)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


class TanhGELU(nn.Module):
    """GELU's tanh approximation, as `GELU` in an order that ONNX Runtime fuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": GELU,
    "gelu_pytorch_tanh": TanhGELU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise UserError(f"the activation {name!r} is not supported: supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


class Attention(nn.Module):
    """Multi-head self-attention, written out so that the graph has the plain MatMul-Softmax-MatMul form."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        return x.view(b, n, self.heads, d // self.heads).transpose(1, 2)  # (B, heads, N, D / heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))

    def first_row(self, x: torch.Tensor) -> torch.Tensor:
        """How much [CLS] attends to each patch, averaged over heads: (B, 1 + T, D) -> (B, T)."""
        q, k = self.split(self.q_proj(x[:, :1])), self.split(self.k_proj(x))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)  # (B, heads, 1, 1 + T)
        return weights.mean(1)[:, 0, 1:]


class Mlp(nn.Module):
    def __init__(self, dim: int, inner: int, act: str):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, inner), nn.Linear(inner, dim), activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        dim, eps = c["hidden_size"], c["layer_norm_eps"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.self_attn = Attention(dim, c["num_attention_heads"])
        self.mlp = Mlp(dim, c["intermediate_size"], c["hidden_act"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Holds the layers under the name they have in checkpoints."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(c) for _ in range(depth)])


class Projector(nn.Module):
    def __init__(self, channels: int, hidden: int, act: str, bias: bool):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, hidden, bias=bias)
        self.act = activation(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def filled(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> nn.Module:
    """`module`, built without storage, with the checkpoint's own tensors put in place (no second copy)."""
    names = module.state_dict().keys()
    module.load_state_dict({n: checkpoint.tensor(prefix + n) for n in names}, assign=True)
    return module.eval().requires_grad_(False)


def depth_of(tap: int, layers: int) -> int:
    """Layers to run for `hidden_states[tap]`: [0] is the embedding, [depth] follows layer `depth`.

    Raises:
        UserError: there is no such layer.
    """
    depth = layers + 1 + tap if tap < 0 else tap
    if not 1 <= depth <= layers:
        raise UserError(f"vision_feature_layer {tap} does not exist in a vision tower of {layers} layers")
    return depth
