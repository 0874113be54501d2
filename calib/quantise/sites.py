"""Which nodes of a vision graph are quantised, and the block each belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from svdprune.calib.quantise.scheme import Scheme

TOKENS = "tokens"  # the value at the tap: features (B, T, D) that the scorer reads and the gather takes rows of
WEIGHTED = ("MatMul", "Gemm")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Site:
    """A node that multiplies an activation by a constant weight: its name, its block, its two inputs' names."""

    node: str
    block: str
    activation: str
    weight: str


def find_sites(graph: Any, scheme: Scheme) -> list[Site]:
    """The nodes of an ``onnx.GraphProto`` that `scheme` quantises, in the graph's order.

    Only what the value `tokens` depends on: the encoder. The products of two activations inside attention, softmax and
    normalisation stay in float, as do the scorer, the selection, the projector, and what only serves a scorer.
    """
    weights = {i.name for i in graph.initializer if i.data_type in _FLOATS and len(i.dims) > 1}
    kinds = (*WEIGHTED, "Conv") if scheme.convolutions else WEIGHTED
    wanted = ancestors(graph, [TOKENS])
    return [
        Site(node.name, block_of(node.name), node.input[0], node.input[1])
        for node in graph.node
        if node.op_type in kinds and node.input[1] in weights and node.input[0] not in weights and node.name in wanted
    ]


def blocks(sites: Sequence[Site]) -> list[str]:
    """The blocks' names, in the graph's order."""
    return list(dict.fromkeys(site.block for site in sites))


def block_of(name: str) -> str:
    """`encoder.layers.3.mlp.fc1/MatMul_51` -> `encoder.layers.3`; outside numbered modules, the module's whole path."""
    path = name.rpartition("/")[0]
    numbered = _BLOCK.match(path)
    return numbered.group() if numbered else path or name


def ancestors(graph: Any, values: Sequence[str]) -> set[str]:
    """Names of the nodes that `values` depend on."""
    producers = {output: node for node in graph.node for output in node.output}
    found: set[str] = set()
    stack = [name for name in values if name in producers]
    while stack:
        node = producers[stack.pop()]
        if node.name not in found:
            found.add(node.name)
            stack += [name for name in node.input if name in producers]
    return found
