"""LLaVA-1.5: a CLIP vision tower read at its last layer but one, [CLS] dropped, a two-layer projector.

The tower is written out here instead of taken from transformers: it reads the vision weights alone, keeps
the layers after the tap out of the graph, and does not change with a transformers release. A test holds it
to transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from svdprune.exporter.checkpoint import Checkpoint
from svdprune.exporter.families.base import VisionSpec
from svdprune.exporter.processor import image_values
from svdprune.runtime.errors import UserError

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."

# Defaults of transformers' CLIPVisionConfig and LlavaConfig: a config.json may leave these out.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def _activation(name: str) -> nn.Module:
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
    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(dim, inner), nn.Linear(inner, dim), _activation(activation)

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


class Encoder(nn.Module):
    """Holds the layers under the name they have in checkpoints."""

    def __init__(self, c: Mapping[str, Any], depth: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(c) for _ in range(depth)])


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


class Projector(nn.Module):
    def __init__(self, channels: int, hidden: int, activation: str, bias: bool):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, hidden, bias=bias)
        self.act = _activation(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


def _filled(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> nn.Module:
    """`module`, built without storage, with the checkpoint's own tensors put in place (no second copy)."""
    names = module.state_dict().keys()
    module.load_state_dict({n: checkpoint.tensor(prefix + n) for n in names}, assign=True)
    return module.eval().requires_grad_(False)


class Llava:
    """See `svdprune.exporter.families.base.Family`."""

    name = "llava"
    model_types = ("llava",)

    def describe(self, checkpoint: Checkpoint) -> VisionSpec:
        config, vision = checkpoint.config, _vision(checkpoint)
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise UserError(
                f"vision_feature_select_strategy {strategy!r} keeps [CLS] among the tokens: only 'default' is supported"
            )
        side = vision["image_size"] // vision["patch_size"]
        image = image_values(checkpoint)
        crop = image["crop"] or image["resize"]
        height, width = crop.get("height", vision["image_size"]), crop.get("width", vision["image_size"])
        if (height, width) != (vision["image_size"],) * 2:
            raise UserError(
                f"the processor makes pictures of {width} x {height} but the vision tower takes squares of "
                f"{vision['image_size']}: the checkpoint's processor does not belong to its model"
            )
        return VisionSpec(
            height=height,
            width=width,
            grid=(side, side),
            channels=vision["hidden_size"],
            hidden=checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
            tap=_tap(config),
            mean=tuple(image["mean"]),
            std=tuple(image["std"]),
            rescale=image["rescale"],
        )

    def encoder(self, checkpoint: Checkpoint) -> nn.Module:
        vision, tap = _vision(checkpoint), _tap(checkpoint.config)
        layers = vision["num_hidden_layers"]
        depth = layers + 1 + tap if tap < 0 else tap  # hidden_states[0] is the embedding, [depth] follows layer `depth`
        if not 1 <= depth <= layers:
            raise UserError(f"vision_feature_layer {tap} does not exist in a vision tower of {layers} layers")
        with torch.device("meta"):
            tower = ClipTower(vision, depth)
        return _filled(tower, checkpoint, TOWER)

    def projector(self, checkpoint: Checkpoint) -> nn.Module:
        config = checkpoint.config
        with torch.device("meta"):
            projector = Projector(
                _vision(checkpoint)["hidden_size"],
                checkpoint.info(PROJECTOR + "linear_2.weight").shape[0],
                config.get("projector_hidden_act", "gelu"),
                config.get("multimodal_projector_bias", True),
            )
        return _filled(projector, checkpoint, PROJECTOR)

    def reference_tokens(self, model: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tap = _tap(vars(model.config))
        out = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)  # type: ignore[union-attr,operator]
        last = (tap if tap >= 0 else len(out.hidden_states) + tap) - 1  # the layer that made hidden_states[tap]
        return out.hidden_states[tap][:, 1:], out.attentions[last][:, :, 0, 1:].mean(1)

    def reference_project(self, model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = model.model.multi_modal_projector(rows)  # type: ignore[union-attr,operator]
        return projected


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    given = checkpoint.config["vision_config"]
    kind = given.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise UserError(f"a LLaVA with a {kind!r} vision tower is not supported: only 'clip_vision_model' is")
    return {**_VISION_DEFAULTS, **given}


def _tap(config: Mapping[str, Any]) -> int:
    tap = config.get("vision_feature_layer", -2)
    if not isinstance(tap, int):
        raise UserError(f"vision_feature_layer {tap!r} takes features of several layers: only one layer is supported")
    return tap


FAMILY = Llava()
